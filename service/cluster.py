"""Joining a Ray cluster, or starting one on this machine."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mimray.trainers.errors import ResourceError

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "ERROR",  # its import undoes what is set on its loggers
}


def set_environment() -> None:
    """Set the variables that Ray reads while it is imported; call it before anything else.

    A local cluster requires a token, since its ports run any code. A cluster that is joined keeps
    its own authentication.
    """
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


@contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """Connect to Ray for the time of a context.

    With `address` or `RAY_ADDRESS` (which `ray job submit` sets) joins that cluster and leaves
    it running; otherwise starts one on this machine, for this process alone, and ends it.

    Args:
        address: the cluster's address: `auto`, `ray://…` or host:port.

    Raises:
        ResourceError: no cluster answers at the address.
    """
    set_environment()
    address = address or os.environ.get("RAY_ADDRESS")
    import logging

    import ray

    if ray.is_initialized():
        yield
        return
    try:
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except ConnectionError as error:
        raise ResourceError(
            f"no Ray cluster answers at {address}: {str(error).splitlines()[0]}",
            hint="`ray start --head` starts one; unset RAY_ADDRESS to work on this machine",
        ) from None
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not address:
        _keep_token_private()
    # Ray prints about its workers, also while it shuts down; standard output is for results.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            yield
        finally:
            ray.shutdown()


def _keep_token_private() -> None:
    """Make Ray's token readable by its owner alone, as Ray does not."""
    token = Path.home() / ".ray" / "auth_token"
    if token.is_file() and token.stat().st_uid == os.getuid():
        token.chmod(0o600)
