"""Folders to write in: for temporary files, for sockets, and for what is kept for a user."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mimray.trainers.errors import ResourceError

# The longest path of a Unix socket, on Linux.
SOCKET_PATH_BYTES = 107
# Ray's longest socket, on a machine with several nodes and long process ids.
RAY_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.99"
# `multiprocessing` makes a folder and a socket in it.
PROCESS_SOCKET = "/pymp-12345678/listener-12345678"
# A session's logs and sockets, before anything is kept in it.
WANTED_FREE_BYTES = 64 << 20
SMALL_FILES_BYTES = 1 << 20
# Short ones, that most machines have.
SHORT_PLACES = ("/tmp", "/var/tmp", "/dev/shm")


def fault(place: str, below: str = "", *, wanted_bytes: int = WANTED_FREE_BYTES) -> str:
    """The reason why a folder cannot hold files or sockets; empty if it can.

    Args:
        place: the folder.
        below: the longest path of a socket below it; empty if it need hold none.
        wanted_bytes: the room it must have.
    """
    size, most = len(os.fsencode(os.path.abspath(place))), SOCKET_PATH_BYTES - len(below)
    if below and size > most:
        return f"is too long for sockets ({size} bytes of at most {most})"
    if not os.path.isdir(place):
        return "is no folder" if os.path.lexists(place) else "does not exist"
    try:
        free_bytes = shutil.disk_usage(place).free
        if free_bytes < wanted_bytes:
            return f"is full ({free_bytes >> 20} MiB free)"
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(b"\0" * 4096)
    except OSError as error:
        return f"cannot be written ({error.strerror})"
    return ""


def temporary_place(below: str = "") -> str | None:
    """The first usable folder for temporary files: `TMPDIR`, else a short one that machines have.

    Args:
        below: the longest path of a socket below it; empty if it need hold none.
    """
    candidates = (os.environ.get("TMPDIR"), *SHORT_PLACES)
    return next((place for place in candidates if place and not fault(place, below)), None)


def private_folder(place: str) -> Path:
    """Make a folder of this user alone in a place that others may write to.

    Raises:
        ResourceError: someone else has made it, or it can be entered by others.
    """
    folder = Path(place, f"mimray-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ResourceError(
            f"{folder} is not a private directory of this user",
            hint="remove it, or set TMPDIR to a directory of your own",
        )
    return folder


@contextmanager
def temporary_files_in(place: str) -> Iterator[None]:
    """Have Python's temporary files made in a place, for the time of a context."""
    before = tempfile.tempdir
    tempfile.tempdir = place
    try:
        yield
    finally:
        tempfile.tempdir = before
