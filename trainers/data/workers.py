"""Decode processes: how they are started, and that they end with the process they serve."""

from __future__ import annotations

import functools
import os
import select
import threading
from typing import Any


def decode_workers(num_workers: int) -> dict[str, Any]:
    """Keyword arguments that make a `DataLoader` decode in processes of its own.

    They are started by a fork server, since a forked copy of a process with Ray's and Arrow's
    threads may deadlock. The fork server is their parent, so torch's own watchdog, which looks
    for the parent, would let them outlive a loader that was killed.

    Args:
        num_workers: number of processes; 0 decodes in the calling process.
    """
    if not num_workers:
        return {"num_workers": 0}
    return {
        "num_workers": num_workers,
        "multiprocessing_context": "forkserver",
        "worker_init_fn": functools.partial(_end_with, os.getpid()),
    }


def _end_with(owner: int, worker_id: int) -> None:
    """End this process as soon as its owner has ended, however that came about."""
    try:
        handle = os.pidfd_open(owner)
    except ProcessLookupError:
        os._exit(1)

    def wait() -> None:
        select.select([handle], [], [])  # readable once the process is gone
        os._exit(1)

    threading.Thread(target=wait, name="end-with-owner", daemon=True).start()
