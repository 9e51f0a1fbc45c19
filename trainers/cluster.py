"""Joining a Ray cluster, or starting one on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mimray.trainers.environment import limits
from mimray.trainers.environment.findings import adjust, require_usable
from mimray.trainers.environment.places import private_folder, temporary_place
from mimray.trainers.errors import ResourceError

logger = logging.getLogger(__name__)

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    # An actor that watches for nodes about to end, as the run's recorder does (`draining_nodes`).
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "ERROR",  # its import undoes what is set on its loggers
}
PROTECTION = {
    "RAY_AUTH_MODE": "token",
    # On every platform, whatever its name says: 0 makes 127.0.0.1 the address of a node.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
CURE = "`ray start --head` starts one; unset RAY_ADDRESS to work on this machine"
CONNECT_TIMEOUT_S = 5.0
# Up to so many CPUs, one copy of an encoder makes as good use of them as several.
FEW_CPUS = 4
# A head's port where the address names none: of its store, and of Ray Client.
STORE_PORT, CLIENT_PORT = 6379, 10001
# Ray's own share of memory for its object store, and the size from which it insists on /dev/shm.
OBJECT_STORE_SHARE = 0.3
LEAST_OBJECT_STORE_BYTES = 80 << 20
SLOW_OBJECT_STORE_BYTES = 10_000_000_000
OTHERS_MAY_READ = stat.S_IRGRP | stat.S_IROTH


def set_environment() -> None:
    """Set the variables that Ray reads while it is imported; call it before anything else."""
    adjust()
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)


@contextmanager
def connected(address: str | None = None, *, own: bool = False) -> Iterator[None]:
    """Connect to Ray for the time of a context, unless this process is connected already.

    Args:
        address: the cluster's address, as `start_ray` takes it.
        own: True for a Ray at the address that mimray has started on this machine.

    Raises:
        ResourceError: no cluster answers at the address, or none can start here.
    """
    set_environment()
    import ray

    if ray.is_initialized():
        yield
        return
    start_ray(address, own=own)
    # Ray prints about its workers, also while it shuts down; standard output is for results.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def connected_if_larger() -> Iterator[None]:
    """Connect to Ray as `connected` does, unless there are but the few CPUs of this process.

    For work that this process can do by itself: to start Ray and its workers takes longer than a
    copy of the encoder on the same CPUs gains.
    """
    set_environment()
    import ray
    import torch

    elsewhere = (os.environ.get("RAY_ADDRESS") or "local") != "local" or ray.is_initialized()
    few = limits.usable_cpus() <= FEW_CPUS and not torch.cuda.is_available()
    if few and not elsewhere:
        yield
        return
    with connected():
        yield


def start_ray(address: str | None = None, *, own: bool = False) -> None:
    """Connect this process to Ray.

    With `address` or `RAY_ADDRESS` (which `ray job submit` sets) joins that cluster, with its own
    authentication, and leaves it running; otherwise starts one on this machine, for this process
    alone, which other machines cannot reach and which refuses whoever has not its token.

    Args:
        address: the cluster's address: `auto`, `ray://…` or host:port.
        own: True for a Ray at the address that mimray has started on this machine, which is
            reached on loopback alone and with the token of this user.

    Raises:
        ResourceError: no cluster answers at the address or it refuses, or none can start here.
    """
    set_environment()
    require_usable()
    for finding in adjust():
        logger.warning("%s", finding)
    import ray

    address = address or os.environ.get("RAY_ADDRESS") or "local"
    here = address == "local"
    if here or own:
        _protect()
    problem = unreachable(address)
    if problem:
        raise ResourceError(f"no Ray cluster answers at {address}: {problem}", hint=CURE)
    try:
        ray.init(
            address=address,
            include_dashboard=False if here else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **(_resources() if here else {}),
        )
    except ConnectionError as error:
        raise ResourceError(
            f"no Ray cluster answers at {address}: {str(error).splitlines()[0]}", hint=CURE
        ) from None
    except ray.exceptions.AuthenticationError as error:
        raise ResourceError(
            f"the Ray cluster at {address} refuses this process: it asks for its token",
            hint="export RAY_AUTH_MODE=token, and put the token of its head's ~/.ray/auth_token "
            "into a file that RAY_AUTH_TOKEN_PATH names",
        ) from error
    except Exception as error:  # a start that takes too long is nothing more specific
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ResourceError(
            f"Ray {'did not start' if here else f'cannot join the cluster at {address}'}: {text}",
            hint="`mimray doctor` looks for the cause",
        ) from error
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)


def unreachable(address: str) -> str:
    """The reason why nothing listens at a cluster's address; empty if something does.

    Ray itself looks for two minutes, and says so in lines of its own.

    Args:
        address: the cluster's address; `auto` and `local` name none to look at.
    """
    if address in ("", "auto", "local"):
        return ""
    parts = urlsplit(address if "://" in address else f"gcs://{address}")
    try:
        port = parts.port or (CLIENT_PORT if parts.scheme == "ray" else STORE_PORT)
        socket.create_connection((parts.hostname, port), CONNECT_TIMEOUT_S).close()
    except ValueError as error:
        return f"{error}: an address is host:port or ray://host:port"
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _protect() -> None:
    """Have the Ray that starts here require a token and listen on loopback alone, unless told.

    Its ports run the code of whoever is let in, and those of its metrics let everyone in.
    """
    for key, value in PROTECTION.items():
        os.environ.setdefault(key, value)
    keep_token()
    # Whoever imported Ray before this has had it read them too early.
    from ray._private import ray_constants
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    ray_constants.ENABLE_RAY_CLUSTER = ray_constants.env_bool(name, True)


def keep_token() -> None:
    """Have a token that its owner alone can read, as Ray would not make it.

    Raises:
        ResourceError: there is a token that this user cannot read.
    """
    if os.environ.get("RAY_AUTH_MODE") != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(given).expanduser() if given else Path.home() / ".ray" / "auth_token"
    try:
        _make_token(file)
    except OSError as error:
        place = temporary_place()
        assert place is not None  # `require_usable` has found one
        kept = private_folder(place) / "auth_token"
        logger.warning("%s: %s: Ray's token is kept in %s", file, error.strerror, kept)
        _make_token(kept)
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(kept)


def _make_token(file: Path) -> None:
    """Write a new token unless there is one, and make it readable by its owner alone."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError), open(file, "x", opener=_private) as new:
        new.write(secrets.token_hex(32))
    with open(file) as readable:
        found = os.fstat(readable.fileno())
        if found.st_uid == os.getuid():
            os.fchmod(readable.fileno(), 0o600)
        elif found.st_mode & OTHERS_MAY_READ:
            logger.warning(
                "%s is another user's, and others can read Ray's token in it: `chmod 600 %s`, or "
                "RAY_AUTH_TOKEN_PATH of a file of your own", file, file,
            )  # fmt: skip


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _resources() -> dict[str, Any]:
    """Arguments of `ray.init` where Ray would count the machine and not this process's share."""
    from ray._common.utils import get_system_memory

    resources: dict[str, Any] = {"num_cpus": limits.usable_cpus()}
    shared = limits.free_shared_memory()
    if not shared:
        resources["_plasma_directory"] = temporary_place()  # Ray fails where there is no /dev/shm
    if not shared or limits.memory_limit() < get_system_memory():
        available = limits.available_memory()
        most = max(shared, SLOW_OBJECT_STORE_BYTES)
        store = max(LEAST_OBJECT_STORE_BYTES, min(int(OBJECT_STORE_SHARE * available), most))
        resources |= {"object_store_memory": store, "_memory": max(available - store, store)}
    return resources
