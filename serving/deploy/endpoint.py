"""Start an endpoint, wait, and end it without leaving anything behind."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil

from mimray.serving.config import API_KEY_VARIABLE, ServeConfig, check_config
from mimray.serving.deploy.haproxy import HAProxyState, haproxy_available, port_is_free
from mimray.trainers.cluster import start_ray
from mimray.trainers.environment.network import is_loopback
from mimray.trainers.errors import ServingError
from mimray.trainers.stopping import in_background, signals_handled_by

if TYPE_CHECKING:
    from mimray.serving.deploy.rollout import Resolve, Rollout

logger = logging.getLogger(__name__)


# Ray keeps a replica for 30 s after it was told to stop, for load balancers that poll; ours is
# told at once.
_DRAIN_S = 1
# Ray's 0.1 s costs the controller 4 % of a core while nothing happens.
_CONTROL_LOOP_S = 0.5
_SHUTDOWN_TIMEOUT_S = 30
_POLL_S = 0.2
# Processes without which Ray is gone, as it names them.
_VITAL = ("gcs_server", "raylet")
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class RayGoneError(ServingError):
    """Ray was ended while the endpoint was to be: requests that it had were not answered."""


class Endpoint:
    """A running endpoint; use it as a context manager or call `close`.

    Attributes:
        url: the endpoint's address.
        models: names of the models.
    """

    def __init__(
        self, config: ServeConfig, rollout: Rollout, state: HAProxyState, *, owns_ray: bool
    ) -> None:
        shown = f"[{config.host}]" if ":" in config.host else config.host
        self.url = f"http://{shown}:{config.port}"
        self.models = tuple(config.models)
        self._config = config
        self._rollout = rollout
        self._state = state
        self._owns_ray = owns_ray
        self._family: set[psutil.Process] = set()
        self._closed = False
        self._know_family()

    @property
    def versions(self) -> dict[str, str]:
        """The version of each model that answers where none is named."""
        return {name: served.stable.number for name, served in self._rollout.models.items()}

    @property
    def heads(self) -> dict[str, list[str]]:
        """The heads of each model's stable version."""
        from mimray.serving.deploy.serve_schema import heads_of

        return {
            name: list(heads_of(served.config, served.stable))
            for name, served in self._rollout.models.items()
        }

    @property
    def without_canary(self) -> dict[str, str]:
        """The reason why a canary that is configured has no version yet, by model."""
        return self._rollout.without_canary

    def follow(self) -> list[str]:
        """Look aliases up once, and roll in what they point at now; see `Rollout.follow`."""
        return self._rollout.follow()

    def wait(self, tell: Callable[[str], None] = logger.info) -> None:
        """Follow aliases until Ctrl-C or SIGTERM, then close.

        Args:
            tell: called with a line of text for each version rolled in or refused.
        """
        stop = threading.Event()

        def on_signal(number: int, frame: FrameType | None) -> None:
            stop.set()

        with signals_handled_by(on_signal):
            try:
                while not stop.wait(timeout=self._config.follow_s):
                    self._know_family()
                    for line in self.follow():
                        tell(line)
            finally:
                try:
                    self.close()
                except RayGoneError as error:
                    tell(str(error))
                    if not stop.is_set():  # something failed, which the error follows
                        logger.error("the endpoint failed", exc_info=error)
                    # Ray's own end would wait for what is gone, and end this process in a minute.
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(0 if stop.is_set() else 1)

    def close(self) -> None:
        """Stop serving; Ray itself is stopped only if this endpoint started it.

        Raises:
            RayGoneError: Ray ended first; nothing of it and of the endpoint is left.
        """
        if not self._closed:
            self._closed = True
            _shut_down(self._state, self._config, self._family, owns_ray=self._owns_ray)

    def _know_family(self) -> None:
        """Note the processes of our Ray: once it is gone, nobody knows whose they are."""
        if self._owns_ray:
            self._family.update(psutil.Process().children(recursive=True))
            self._family = {process for process in self._family if process.is_running()}

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def serve_bundles(
    models: Mapping[str, Path],
    *,
    host: str | None = None,
    port: int | None = None,
    api_key: str | None = None,
    **options: Any,
) -> Endpoint:
    """Serve frozen encoders from folders.

    Args:
        models: directories of bundles, by the models' names in the URL.
        host: address to listen on; `ServeConfig` has the default.
        port: port to listen on; `ServeConfig` has the default.
        api_key: a key that clients may send; by default the environment's `MIMRAY_API_KEY`.
        options: options of every model, as in `ModelConfig`.

    Returns:
        The endpoint, ready to answer.

    Raises:
        ServingError: there is no model, or `start` refuses.
    """
    from mimray.serving.deploy.serve_schema import Version

    given = {"host": host, "port": port}
    tree: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    tree["models"] = {name: {"bundle": str(path), **options} for name, path in models.items()}
    if not models:
        raise ServingError("there is nothing to serve", hint="name at least one bundle")

    def resolve(reference: str) -> Version:
        return Version(reference, Path(reference).resolve(), "1")

    return start(check_config(tree, "serve"), resolve, api_key=api_key)


def start(config: ServeConfig, resolve: Resolve, *, api_key: str | None = None) -> Endpoint:
    """Serve frozen encoders over HTTP.

    Ray is started, or joined at `RAY_ADDRESS`, unless the caller has.

    Args:
        config: the endpoint's configuration.
        resolve: finds the version that a model's reference means now.
        api_key: a key clients may send beside those of `config.keys`; by default the
            environment's `MIMRAY_API_KEY`.

    Returns:
        The endpoint, ready to answer.

    Raises:
        ServingError: the port is taken, a public address has no key, or Serve did not start.
        BundleError: a bundle is missing or damaged.
        ResourceError: the cluster cannot hold the replicas.
    """
    from mimray.serving.api.keys import KeyRing, hash_key
    from mimray.serving.telemetry.tracing import Tracer

    key = api_key or os.environ.get(API_KEY_VARIABLE) or None
    _check_names(config.models)
    _check_address(config.host, has_keys=bool(key or config.keys))
    if config.keys is not None:
        KeyRing(config.keys, [])  # refuses a file that is absent or damaged, now rather than later
    host, port = config.host, config.port
    state = HAProxyState(port)
    if state.clean_leftovers():
        logger.warning("ended the HAProxy that an earlier server left on port %d", port)
    if not port_is_free(host, port):
        raise _port_taken(config)

    from mimray.serving.deploy.rollout import Rollout

    rollout = Rollout(
        config,
        resolve,
        key_sha256=hash_key(key) if key else None,
        needs_key=not is_loopback(host),
    )
    rollout.prepare()
    Tracer().close()  # an exporter that is set and missing is told of now

    import ray

    owns_ray = not ray.is_initialized()
    if owns_ray:
        start_ray()
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
        with signals_handled_by(interrupt):
            _start_serve(config, state)
            rollout.start()
    except BaseException:
        with contextlib.suppress(RayGoneError):  # what stopped the start says more
            _shut_down(state, config, (), owns_ray=owns_ray)
        raise
    return Endpoint(config, rollout, state, owns_ray=owns_ray)


def _start_serve(config: ServeConfig, state: HAProxyState) -> None:
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.config import ControllerOptions, HTTPOptions

    environment = {
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(_DRAIN_S),
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": str(_CONTROL_LOOP_S),
    }
    if haproxy_available() and _haproxy_reaches_replicas(config.host):
        state.claim()
        environment |= state.environment(
            silence_s=config.limits.body_timeout_s,
            requests_per_source=config.limits.requests_per_source,
        )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(
            http_options=HTTPOptions(host=config.host, port=config.port),
            controller_options=ControllerOptions(runtime_env={"env_vars": environment}),
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
    except RayError as error:
        complaint = state.complaint()
        if "cannot bind socket" in complaint:  # somebody took it meanwhile
            raise _port_taken(config) from error
        raise ServingError(
            f"Ray Serve did not start: {complaint or str(error).splitlines()[0]}",
            hint="install the Ray of constraints.txt; `mimray doctor` says what there is",
        ) from error


def _port_taken(config: ServeConfig) -> ServingError:
    return ServingError(
        f"port {config.port} on {config.host} is taken",
        hint="choose another with --port, or stop its owner",
    )


def _haproxy_reaches_replicas(host: str) -> bool:
    """True if HAProxy, which asks 127.0.0.1, finds its node's replicas on the endpoint's host."""
    import ray

    if host in ("127.0.0.1", "localhost"):
        return len([node for node in ray.nodes() if node["Alive"]]) == 1
    return host == "0.0.0.0"


def _check_names(models: Mapping[str, Any]) -> None:
    for name in models:
        if not _MODEL_NAME.fullmatch(name):
            raise ServingError(
                f"{name!r} cannot be a model's name",
                hint="use letters, digits, `.`, `_` and `-`",
            )


def _check_address(host: str, *, has_keys: bool) -> None:
    if not is_loopback(host) and not has_keys:
        raise ServingError(
            f"{host} can be reached from other machines, and no API key is set",
            hint=f"`mimray keys add NAME` makes one, or set {API_KEY_VARIABLE}; "
            "or listen on 127.0.0.1",
        )


def _serve_is_running() -> bool:
    """True if the cluster runs another Serve, whose address and applications are not ours."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    return True


def _shut_down(
    state: HAProxyState, config: ServeConfig, family: Iterable[psutil.Process], *, owns_ray: bool
) -> None:
    """Stop Serve and, if it is ours, Ray; a second Ctrl-C does not cut it short.

    Raises:
        RayGoneError: Ray ended first, as where a signal is sent to all processes of a group.
    """
    import ray
    from ray import serve

    def stop_serve() -> None:
        timeout_s = config.limits.request_timeout_s
        if not state.drain(timeout_s):
            logger.warning("some requests took longer than %g s", timeout_s)
        if ray.is_initialized():
            _end_controller()
            serve.shutdown()

    gone = False
    with signals_handled_by(signal.SIG_IGN):
        try:
            if owns_ray:
                gone = not _done_while_ray_lives(stop_serve)
            else:
                stop_serve()
        finally:
            if gone:
                for process in family:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
            elif owns_ray:
                ray.shutdown()
            state.release()
    if gone:
        raise RayGoneError("Ray was ended before the endpoint, which is ended, too")


def _done_while_ray_lives(work: Callable[[], None]) -> bool:
    """Do something in a thread, and give up on it once a process of our Ray has ended.

    Calls to a Ray that is gone wait for a minute, and then end this process.

    Returns:
        False if it was given up.

    Raises:
        BaseException: the work ended with it.
    """
    import ray

    node = ray._private.worker._global_node
    thread, errors = in_background(work, "shutdown")
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_S)
        if node is not None and any(kind in _VITAL for kind, _ in node.dead_processes()):
            return False
    for error in errors:
        raise error
    return True


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
