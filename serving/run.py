"""Start an endpoint, wait, and leave nothing behind."""

from __future__ import annotations

import ipaddress
import logging
import math
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from serving.app import hash_key
from serving.haproxy import HAProxyState, haproxy_available, port_is_free
from serving.predictor import PredictorLimits
from trainers.errors import ResourceError, ServingError

logger = logging.getLogger(__name__)

API_KEY_VARIABLE = "MIMRAY_API_KEY"
# Ray keeps a replica for 30 s after it was told to stop, for load balancers that poll; ours is
# told at once.
_DRAIN_S = 1
_SHUTDOWN_TIMEOUT_S = 30
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Endpoint:
    """A running endpoint; use it as a context manager or call `close`.

    Attributes:
        url: where it answers.
        models: names of the models.
    """

    def __init__(
        self, url: str, models: tuple[str, ...], state: HAProxyState, *, owns_ray: bool
    ) -> None:
        self.url = url
        self.models = models
        self._state = state
        self._owns_ray = owns_ray
        self._closed = False

    def wait(self) -> None:
        """Block until Ctrl-C or SIGTERM, then close."""
        stop = threading.Event()

        def on_signal(number: int, frame: FrameType | None) -> None:
            stop.set()

        with _signals_handled_by(on_signal):
            try:
                while not stop.wait(timeout=1.0):
                    pass
            finally:
                self.close()

    def close(self) -> None:
        """Stop serving; Ray itself is stopped only if this endpoint started it."""
        if not self._closed:
            self._closed = True
            _shut_down(self._state, owns_ray=self._owns_ray)

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def serve_bundles(
    models: Mapping[str, Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    num_replicas: int = 1,
    num_cpus: float | None = None,
    device: str = "auto",
    max_batch_size: int = 16,
    batch_wait_s: float = 0.005,
    api_key: str | None = None,
) -> Endpoint:
    """Serve frozen encoders over HTTP.

    Ray is started when the caller has not, or joined where `RAY_ADDRESS` says.

    Args:
        models: bundles by the name they get in the URL.
        host: address to listen on; anything but loopback needs an API key.
        port: port to listen on.
        num_replicas: processes a model.
        num_cpus: CPU cores a replica, which is also its number of threads; by default an equal
            share of what the cluster has.
        device: `cpu`, `cuda`, or `auto` for a GPU where the cluster has one.
        max_batch_size: most pictures in one pass through a model.
        batch_wait_s: longest a picture waits for company while the model is free.
        api_key: the key clients must send; by default the environment's `MIMRAY_API_KEY`.

    Returns:
        The endpoint, ready to answer.

    Raises:
        ServingError: the port is taken, a public address has no key, or Serve did not start.
        BundleError: a bundle is missing or damaged.
        ResourceError: the cluster cannot hold the replicas.
    """
    from trainers.bundles import load_bundle

    key = api_key or os.environ.get(API_KEY_VARIABLE) or None
    _check_names(models)
    _check_address(host, key)
    state = HAProxyState(port)
    if state.clean_leftovers():
        logger.warning("ended the HAProxy that an earlier server left on port %d", port)
    if not port_is_free(host, port):
        raise ServingError(
            f"port {port} on {host} is taken", hint="choose another with --port, or stop its owner"
        )
    for bundle in models.values():
        load_bundle(bundle)

    import ray

    owns_ray = not ray.is_initialized()
    if owns_ray:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    if _serve_is_running():
        if owns_ray:
            ray.shutdown()
        raise ServingError(
            "this Ray cluster runs Ray Serve already", hint="stop it with `serve shutdown` first"
        )

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        # After `ray.init`, which puts a handler of its own in place.
        with _signals_handled_by(interrupt):
            _start(
                models,
                state,
                host=host,
                port=port,
                num_replicas=num_replicas,
                num_cpus=num_cpus,
                device=device,
                limits=PredictorLimits(max_batch_size=max_batch_size, batch_wait_s=batch_wait_s),
                key_hash=hash_key(key) if key else None,
            )
    except BaseException:
        _shut_down(state, owns_ray=owns_ray)
        raise
    shown = f"[{host}]" if ":" in host else host
    return Endpoint(f"http://{shown}:{port}", tuple(models), state, owns_ray=owns_ray)


def _start(
    models: Mapping[str, Path],
    state: HAProxyState,
    *,
    host: str,
    port: int,
    num_replicas: int,
    num_cpus: float | None,
    device: str,
    limits: PredictorLimits,
    key_hash: str | None,
) -> None:
    from ray import serve
    from ray.serve.config import ControllerOptions, HTTPOptions

    from serving.deployment import ModelSettings, model_target, root_target

    cpus, gpus = _share(num_replicas * len(models), num_cpus, device)
    environment = {"RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(_DRAIN_S)}
    if haproxy_available() and _haproxy_reaches_replicas(host):
        state.claim()
        environment |= state.environment()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        http_options=HTTPOptions(host=host, port=port),
        controller_options=ControllerOptions(runtime_env={"env_vars": environment}),
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    targets = [
        model_target(
            ModelSettings(
                name=name,
                bundle=Path(bundle).resolve(),
                device=device,
                num_threads=max(1, int(cpus)),
                limits=limits,
                key_hash=key_hash,
            ),
            num_replicas=num_replicas,
            num_cpus=cpus,
            num_gpus=gpus,
        )
        for name, bundle in models.items()
    ]
    try:
        serve.run_many([*targets, root_target(tuple(models), key_hash=key_hash)])
    except RuntimeError as error:
        raise ServingError(f"Ray Serve did not start the endpoint: {error}") from error


def _haproxy_reaches_replicas(host: str) -> bool:
    """Replicas listen on the endpoint's host; HAProxy looks for those of its node on 127.0.0.1."""
    import ray

    if host in ("127.0.0.1", "localhost"):
        return len([node for node in ray.nodes() if node["Alive"]]) == 1
    return host == "0.0.0.0"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_names(models: Mapping[str, Path]) -> None:
    if not models:
        raise ServingError("there is nothing to serve", hint="name at least one bundle")
    for name in models:
        if not _MODEL_NAME.fullmatch(name):
            raise ServingError(
                f"{name!r} cannot be a model's name",
                hint="use letters, digits, `.`, `_` and `-`",
            )


def _check_address(host: str, key: str | None) -> None:
    if not is_loopback(host) and not key:
        raise ServingError(
            f"{host} can be reached from other machines, and no API key is set",
            hint=f"set {API_KEY_VARIABLE}, or listen on 127.0.0.1",
        )


def _share(num_replicas: int, num_cpus: float | None, device: str) -> tuple[float, float]:
    """CPUs and GPUs of one replica, held against what the cluster has."""
    import ray

    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    if num_cpus is None:
        num_cpus = float(math.floor(cpus / num_replicas)) or cpus / num_replicas
    if num_cpus * num_replicas > cpus or cpus == 0:
        raise ResourceError(
            f"{num_replicas} replicas of {num_cpus:g} CPUs need {num_replicas * num_cpus:g}, "
            f"the cluster has {cpus:g}",
            hint="fewer replicas, or fewer CPUs each",
        )
    if device == "cpu" or (device == "auto" and gpus == 0):
        return num_cpus, 0.0
    if gpus == 0:
        raise ResourceError(
            f"device {device!r} needs a GPU, the cluster has none", hint="use --device cpu"
        )
    return num_cpus, 1.0 / math.ceil(num_replicas / gpus)


def _serve_is_running() -> bool:
    """Whether someone else's Serve is there, whose address and applications are not ours."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    return True


def _shut_down(state: HAProxyState, *, owns_ray: bool) -> None:
    """Stop Serve and, if it is ours, Ray; a second Ctrl-C does not cut it short."""
    import ray
    from ray import serve

    with _signals_handled_by(signal.SIG_IGN):
        try:
            if ray.is_initialized():
                _end_controller()
                serve.shutdown()
        finally:
            if owns_ray:
                ray.shutdown()
            state.release()


def _end_controller() -> None:
    """Ask Serve's controller to take everything down, and wait until it is gone.

    `serve.shutdown` waits inside a call to the controller, which ends by killing itself; Ray
    then reports that call as failed on the terminal.
    """
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    deadline = time.monotonic() + _SHUTDOWN_TIMEOUT_S
    try:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        ray.get(controller.graceful_shutdown.remote(wait=False), timeout=_SHUTDOWN_TIMEOUT_S)
        while time.monotonic() < deadline:
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
            time.sleep(0.1)
    except ValueError:
        return  # there is no controller, or not any more
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
        logger.warning("Serve's controller did not end by itself: %s", error)


@contextmanager
def _signals_handled_by(
    handler: signal.Handlers | type[None] | object,
) -> Iterator[None]:
    """Handle SIGINT and SIGTERM for a while; outside the main thread nothing can be done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number in _SIGNALS:
        signal.signal(number, handler)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
