"""The access log: a line of JSON for each request, written by a thread of its own."""

from __future__ import annotations

import atexit
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from logging.handlers import QueueListener, RotatingFileHandler
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TextIO

from mimray.trainers.errors import ServingError

logger = logging.getLogger(__name__)

MAX_BYTES = 100 * 2**20
KEPT_FILES = 5
# Most lines that wait for a slow disk; further ones are lost.
MAX_WAITING = 10_000
_MAX_STRING = 500
_TELL_AGAIN_S = 60.0


class AccessLog:
    """Writes lines to a handler.

    Args:
        handler: the handler that writes; None writes nothing.

    Attributes:
        lost: number of lines lost for want of room.
    """

    def __init__(self, handler: logging.Handler | None) -> None:
        self.lost = 0
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._listener: QueueListener | None = None
        if handler is not None:
            handler.setFormatter(_Lines())
            self._listener = QueueListener(self._queue, handler)
            self._listener.start()
            atexit.register(self.close)

    def write(self, fields: Mapping[str, Any]) -> None:
        """Write a line; it never waits and never raises.

        Args:
            fields: the line's members, values as JSON has them; the time and the level are added.
        """
        if self._listener is None:
            return
        if self._queue.qsize() < MAX_WAITING:
            self._queue.put(logging.makeLogRecord({"msg": fields}))
            return
        if not self.lost:
            logger.warning("the access log cannot keep up; requests go unnoted")
        self.lost += 1

    def close(self) -> None:
        """Write what is left, and stop."""
        listener, self._listener = self._listener, None
        if listener is not None:
            atexit.unregister(self.close)
            listener.stop()
            for handler in listener.handlers:
                try:
                    handler.close()
                except OSError as error:
                    logger.warning("the access log could not be written to its end: %r", error)


def open_access_log(target: str | None) -> AccessLog:
    """Open the access log.

    Args:
        target: `-` for standard output; `ray` for Ray's own logs; None for no log; else a path, to
            which the replica's name is added, since each process rotates its own files.

    Raises:
        ServingError: the file cannot be written.
    """
    if target == "ray":
        target = _among_rays_logs()
    if target is None:
        return AccessLog(None)
    if target == "-":
        return AccessLog(_Stream(sys.stdout))
    path = Path(target)
    path = path.with_name(f"{path.stem}-{_process_name()}{path.suffix or '.jsonl'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return AccessLog(_File(path, maxBytes=MAX_BYTES, backupCount=KEPT_FILES, encoding="utf-8"))
    except OSError as error:
        raise ServingError(
            f"the access log {path} cannot be written: {error.strerror}",
            hint="`access_log` says where it goes",
        ) from error


class _Lines(logging.Formatter):
    """The fields as JSON, which escapes line breaks, so that no client forges a line."""

    def format(self, record: logging.LogRecord) -> str:
        fields: Any = record.msg
        now = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        status = int(fields.get("status", 0))
        level = "error" if status >= 500 and status != 503 else "info"
        line = {"ts": now.replace("+00:00", "Z"), "level": level}
        line |= {name: _shortened(value) for name, value in fields.items()}
        return json.dumps(line, separators=(",", ":"), default=str)


class _Calm(logging.Handler):
    """Warns once a minute that lines cannot be written; logging prints a traceback for each."""

    _told = -math.inf

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        now = time.monotonic()
        if now - self._told >= _TELL_AGAIN_S:
            self._told = now
            logger.warning("the access log cannot be written: %r", sys.exc_info()[1])


class _Stream(_Calm, logging.StreamHandler[TextIO]):
    pass


class _File(_Calm, RotatingFileHandler):
    pass


def _shortened(value: Any) -> Any:
    """A value cut to the longest string: clients choose paths and names."""
    if isinstance(value, str) and len(value) > _MAX_STRING:
        return value[: _MAX_STRING - 1] + "…"
    return value


def _among_rays_logs() -> str | None:
    """A path at which the dashboard and `ray logs` find the log; None outside Ray."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    from ray.serve._private.logging_utils import get_serve_logs_dir

    return f"{get_serve_logs_dir()}/mimray-access.jsonl"


def _process_name() -> str:
    """The replica's name, unique over all nodes; outside Ray Serve the process's number."""
    if "ray.serve" in sys.modules:
        from ray import serve
        from ray.serve.exceptions import RayServeException

        try:
            replica = serve.get_replica_context().replica_id
        except RayServeException:
            return str(os.getpid())
        name = f"{replica.deployment_id.app_name}-{replica.unique_id}"
        return re.sub(r"[^A-Za-z0-9._-]", "_", name)
    return str(os.getpid())
