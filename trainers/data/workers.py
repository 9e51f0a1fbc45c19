"""Decode processes: how they start, what they share, and that they end with their owner."""

from __future__ import annotations

import functools
import logging
import multiprocessing
import multiprocessing.util
import os
import select
import threading
from multiprocessing import forkserver
from typing import Any

from mimray.trainers.environment.places import (
    PROCESS_SOCKET,
    fault,
    temporary_files_in,
    temporary_place,
)

logger = logging.getLogger(__name__)

_CONTEXT = "forkserver"
# Imported once by the fork server, and not by each process that it forks.
_PRELOADED = ["__main__", "mimray.trainers.data.loader"]


def decode_workers(num_workers: int, prefetch_batches: int | None = None) -> dict[str, Any]:
    """Keyword arguments that make a `DataLoader` decode in processes of its own.

    They are started by a fork server, since a forked copy of a process with Ray's and Arrow's
    threads may deadlock. The fork server is their parent, so torch's own watchdog, which looks
    for the parent, would let them outlive a loader that was killed.

    Where the machine lets none be started, the calling process decodes by itself, with a warning.

    Args:
        num_workers: number of processes; 0 decodes in the calling process.
        prefetch_batches: batches that each process makes ahead; torch's default if None.
    """
    if not num_workers:
        return {"num_workers": 0}
    problem = _hindrance()
    if problem:
        logger.warning("pictures are decoded in the process that uses them: %s", problem)
        return {"num_workers": 0}
    _start_fork_server()
    return {
        "num_workers": num_workers,
        "prefetch_factor": prefetch_batches,
        "multiprocessing_context": _CONTEXT,
        "worker_init_fn": functools.partial(_end_with, os.getpid()),
    }


def start_fork_server(num_workers: int) -> None:
    """Start the parent of decode processes, so that it imports what they need meanwhile.

    Args:
        num_workers: number of processes that will be asked for; 0 starts nothing.
    """
    if num_workers and not _hindrance():
        _start_fork_server()


def _start_fork_server() -> None:
    forkserver.set_forkserver_preload(_PRELOADED)  # without effect on one that runs
    forkserver.ensure_running()


def _hindrance() -> str:
    """The reason why no processes can be started to decode; empty if they can."""
    place = temporary_place(PROCESS_SOCKET)
    if place is None:
        return f"there is no folder for their sockets: /tmp {fault('/tmp', PROCESS_SOCKET)}"
    with temporary_files_in(place):
        multiprocessing.util.get_temp_dir()  # made once and remembered
    try:
        multiprocessing.get_context(_CONTEXT).Lock()
    except (OSError, ImportError) as error:
        return f"processes cannot share a lock, as without /dev/shm ({error})"
    return ""


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
