"""A line of JSON for every request, written by a thread that nothing waits for."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener, RotatingFileHandler
from pathlib import Path
from queue import SimpleQueue
from typing import Any

MAX_BYTES = 100 * 2**20
KEPT_FILES = 5


class AccessLog:
    """Writes lines to a handler, or to nowhere.

    Args:
        handler: where lines go; None for nowhere.
    """

    def __init__(self, handler: logging.Handler | None) -> None:
        self._queue: QueueHandler | None = None
        self._listener: QueueListener | None = None
        if handler is not None:
            handler.setFormatter(logging.Formatter("%(message)s"))
            lines: SimpleQueue[Any] = SimpleQueue()
            self._queue = QueueHandler(lines)
            self._listener = QueueListener(lines, handler)
            self._listener.start()

    def write(self, facts: dict[str, Any]) -> None:
        """Note a request.

        Args:
            facts: what JSON can say; the time and the level are added.
        """
        if self._queue is None:
            return
        status = int(facts.get("status", 0))
        level = "error" if status >= 500 and status != 503 else "info"
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = json.dumps({"ts": now, "level": level, **facts}, separators=(",", ":"))
        record = logging.LogRecord("mimray.access", logging.INFO, "", 0, line, None, None)
        self._queue.enqueue(record)

    def close(self) -> None:
        """Write what is left, and stop."""
        if self._listener is not None:
            self._listener.stop()
            for handler in self._listener.handlers:
                handler.close()
            self._queue = self._listener = None


def open_access_log(target: str | None) -> AccessLog:
    """A log by where it goes.

    Args:
        target: `-` for standard output; a path, to which the process's number is added, since
            files that grow too large are turned over by the process that writes them; `ray` for
            Ray's own logs; None for nowhere.
    """
    if target == "ray":
        target = _among_rays_logs()
    if target is None:
        return AccessLog(None)
    if target == "-":
        return AccessLog(logging.StreamHandler(sys.stdout))
    path = Path(target)
    path = path.with_name(f"{path.stem}-{os.getpid()}{path.suffix or '.jsonl'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return AccessLog(
        RotatingFileHandler(path, maxBytes=MAX_BYTES, backupCount=KEPT_FILES, delay=True)
    )


def _among_rays_logs() -> str | None:
    """Where the dashboard and `ray logs` find it; None outside Ray."""
    import ray

    if not ray.is_initialized():
        return None
    from ray._private.worker import global_worker

    folder = Path(global_worker.node.get_session_dir_path()) / "logs" / "serve"
    return str(folder / "mimray-access.jsonl")
