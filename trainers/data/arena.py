"""Decoded pictures that all processes of a node share, in memory-mapped files.

Readers take no lock. A writer reserves room under a lock, writes the pixels there, and then sets
the picture's entry, so that a reader finds a whole picture or none.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import mmap
import os
import shutil
import stat
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import simplejpeg
from PIL import features

from mimray.trainers.data.cache import user_cache

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
# Left to others: torch hands batches from decode processes over in /dev/shm, and dies without.
SPARE_BYTES = 1 << 30

_FORMAT = 1
_COLUMNS = {scale: column for column, scale in enumerate((1, 2, 4, 8))}
_ENTRY_BYTES = 8 * len(_COLUMNS)
_BLOB = struct.Struct("<5i4x")  # width, height, stored width, stored height, drafts
_STATE = struct.Struct("<2q")  # bytes taken, bound
_ALIGN = 8
_STATE_FILE, _INDEX_FILE, _PIXELS_FILE, _USERS_FILE = "state", "index", "pixels", "users"


class Known(NamedTuple):
    """Facts that an arena holds of a picture beside pixels.

    Attributes:
        size: upright (width, height) as stored, in pixels.
        drafts: True if its format is decoded at lower scales where these are enough.
    """

    size: tuple[int, int]
    drafts: bool


class Arena:
    """Decoded pictures of one dataset on one node; belongs to the process that opened it.

    Args:
        folder: folder that `open_arena` made. `index` is int64 [N, 4], by draft scale 1, 2, 4 and
            8: 0 where nothing is, else 1 + the offset of the picture in `pixels`; below 0, the
            negated id of the process that is writing it. While it is open, `users` is locked.
    """

    def __init__(self, folder: Path) -> None:
        names = (_STATE_FILE, _INDEX_FILE, _PIXELS_FILE, _USERS_FILE)
        with contextlib.ExitStack() as opened:
            fds = []
            for name in names:
                fds.append(os.open(folder / name, os.O_RDWR | os.O_CLOEXEC))
                opened.callback(os.close, fds[-1])
            self._state_fd, index_fd, self._pixels_fd, users_fd = fds
            fcntl.flock(users_fd, fcntl.LOCK_SH)
            self.bound = _STATE.unpack(os.pread(self._state_fd, _STATE.size, 0))[1]
            self._index = memoryview(mmap.mmap(index_fd, 0)).cast("q")
            pixels = mmap.mmap(self._pixels_fd, self.bound, prot=mmap.PROT_READ)
            self._pixels = memoryview(pixels)
            self._files = opened.pop_all()
        self._room = self.bound  # at most so much is free; others take of it as well
        self._thread_lock = threading.Lock()  # flock holds processes apart, not threads

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self._files.close()

    def known(self, index: int) -> Known | None:
        """Facts of a picture; None where it is not kept at any scale."""
        first = index * len(_COLUMNS)
        for entry in self._index[first : first + len(_COLUMNS)]:
            if entry > 0:
                _, _, width, height, drafts = _BLOB.unpack_from(self._pixels, entry - 1)
                return Known((width, height), bool(drafts))
        return None

    def get(self, index: int, scale: int) -> np.ndarray | None:
        """A picture as it was decoded at a scale, uint8 [H, W, 3]; None where it is not there."""
        entry = self._index[index * len(_COLUMNS) + _COLUMNS[scale]]
        if entry <= 0:
            return None
        width, height, *_ = _BLOB.unpack_from(self._pixels, entry - 1)
        start = entry - 1 + _BLOB.size
        pixels = self._pixels[start : start + 3 * width * height]
        return np.frombuffer(pixels, dtype=np.uint8).reshape(height, width, 3)

    def add(self, index: int, scale: int, known: Known, pixels: np.ndarray) -> None:
        """Keep a picture, unless there is no room or another process was faster.

        Args:
            index: index of the picture.
            scale: draft scale that it was decoded at: 1, 2, 4 or 8.
            known: stored size of the picture, and whether the scale may differ another time.
            pixels: upright RGB, uint8 [H, W, 3].
        """
        height, width, _ = pixels.shape
        slot = index * len(_COLUMNS) + _COLUMNS[scale]
        try:
            start = self._reserve(slot, _BLOB.size + 3 * width * height)
            if start is None:
                return
            # Written as to a file: a store to memory that has run out would end the process.
            header = _BLOB.pack(width, height, *known.size, known.drafts)
            self._write(header + pixels.tobytes(), start)
        except OSError as error:  # A cache that cannot be written costs time, not the run.
            logger.warning("no more decoded pictures are kept: %s", error)
            self._room = 0
            return
        # The lock's system calls stand between the pixels and the entry on every processor.
        with self._locked():
            self._index[slot] = start + 1

    def _reserve(self, slot: int, num_bytes: int) -> int | None:
        """Take room for a blob; None where there is none, or it is there or on its way."""
        num_bytes = -(-num_bytes // _ALIGN) * _ALIGN
        if num_bytes > self._room:
            return None
        disk = os.fstatvfs(self._pixels_fd)
        if disk.f_bavail * disk.f_frsize < SPARE_BYTES + num_bytes:
            return None
        with self._locked():
            if self._index[slot] > 0 or _being_written(self._index[slot]):
                return None
            start = int(_STATE.unpack(os.pread(self._state_fd, _STATE.size, 0))[0])
            self._room = self.bound - start
            if num_bytes > self._room:
                return None
            os.pwrite(self._state_fd, _STATE.pack(start + num_bytes, self.bound), 0)
            self._index[slot] = -os.getpid()
            return start

    def _write(self, data: bytes, start: int) -> None:
        rest = memoryview(data)
        while rest:
            written = os.pwrite(self._pixels_fd, rest, start)
            rest, start = rest[written:], start + written

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._thread_lock:
            fcntl.flock(self._state_fd, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._state_fd, fcntl.LOCK_UN)


def open_arena(fingerprint: str, num_samples: int, max_mib: int) -> Arena | None:
    """Open this node's arena of a dataset, or make it.

    It lies in /dev/shm where that has the room, else beside the user's cache. One of another
    bound is used as it is while others use it, and else made anew. Making one removes those of
    this user, of whatever dataset, that nobody uses.

    Args:
        fingerprint: fingerprint of the dataset.
        num_samples: pictures of it.
        max_mib: bound of everything that is kept.

    Returns:
        None, and a warning, where it cannot be.
    """
    max_bytes = max_mib << 20
    problem = f"data.decoded_cache_mib {max_mib} does not hold an index of {num_samples} pictures"
    if max_bytes > num_samples * _ENTRY_BYTES + _BLOB.size:
        problem = f"neither /dev/shm nor the cache folder has {max_mib} MiB to spare"
        for root in _roots():
            try:
                with _guarded(root):
                    folder = root / _name(fingerprint, num_samples)
                    arena = _opened(folder, max_bytes - num_samples * _ENTRY_BYTES)
                    if arena is None and _make(folder, num_samples, max_bytes):
                        arena = Arena(folder)
                    if arena is not None:
                        return arena
            except OSError as error:
                problem = str(error)
    logger.warning("decoded pictures are not kept: %s", problem)
    return None


def picture_bytes(sizes: np.ndarray) -> np.ndarray:
    """Bytes of an arena's bound that pictures of (width, height), int64 [N, 2], take; int64 [N]."""
    num_bytes: np.ndarray = _BLOB.size + 3 * sizes.prod(axis=1)
    return -(-num_bytes // _ALIGN) * _ALIGN + _ENTRY_BYTES


def release(fingerprint: str) -> None:
    """Remove this node's arena of a dataset; whoever has it open keeps what is in it."""
    for root in filter(Path.is_dir, _roots()):
        try:
            with _guarded(root):
                for folder in root.glob(f"{_prefix(fingerprint)}-*"):
                    shutil.rmtree(folder)
        except OSError as error:
            logger.warning("decoded pictures in %s are not removed: %s", root, error)


def _roots() -> list[Path]:
    cache = user_cache(f"decoded-{os.getuid()}")
    return [SHARED_MEMORY / f"mimray-{os.getuid()}", cache]


def _prefix(fingerprint: str) -> str:
    return f"decoded-{os.getuid()}-{fingerprint[:32]}"


def _name(fingerprint: str, num_samples: int) -> str:
    """Name of an arena's folder; it differs where the contents would.

    Decoders differ in the last bit. What is on a disk may be torn after the machine stopped, or
    seen by another node; so it is for one node from one start to the next.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    libjpeg = (features.version("jpg"), features.version("libjpeg_turbo"))
    about = repr((_FORMAT, PIL.__version__, libjpeg, simplejpeg.__version__, boot, num_samples))
    return f"{_prefix(fingerprint)}-{hashlib.sha256(about.encode()).hexdigest()[:8]}"


@contextlib.contextmanager
def _guarded(root: Path) -> Iterator[None]:
    """Lock a folder of this user alone, so that nobody else makes or removes arenas in it."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = root.lstat()
    # /dev/shm is everybody's: another user may have made it first.
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise PermissionError(f"{root} is not a folder of this user alone")
    guard = os.open(root / "guard", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX)
        yield
    finally:
        os.close(guard)


def _opened(folder: Path, bound: int) -> Arena | None:
    try:
        arena = Arena(folder)
    except FileNotFoundError:  # or parts of it were deleted
        return None
    if arena.bound == bound:
        return arena
    found = arena.bound
    del arena  # or this process would be one of its users
    if _idle(folder):
        return None
    logger.info("decoded pictures in use here are bounded by %d MiB", found >> 20)
    return Arena(folder)


def _make(folder: Path, num_samples: int, max_bytes: int) -> bool:
    """Make an empty arena, in place of those that nobody uses; False where there is no room."""
    for other in folder.parent.iterdir():
        if other.is_dir() and _idle(other):
            shutil.rmtree(other)
    if _free_bytes(folder.parent) < max_bytes + SPARE_BYTES:
        return False
    part = folder.with_suffix(".part")
    part.mkdir(mode=0o700)
    bound = max_bytes - num_samples * _ENTRY_BYTES
    for name in (_STATE_FILE, _INDEX_FILE, _PIXELS_FILE, _USERS_FILE):
        fd = os.open(part / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if name == _STATE_FILE:
                os.pwrite(fd, _STATE.pack(0, bound), 0)
            elif name == _INDEX_FILE:
                os.posix_fallocate(fd, 0, num_samples * _ENTRY_BYTES)  # stores cannot fail later
            elif name == _PIXELS_FILE:
                os.ftruncate(fd, bound)
        finally:
            os.close(fd)
    part.rename(folder)
    return True


def _free_bytes(root: Path) -> int:
    free = shutil.disk_usage(root).free
    if root.parent != SHARED_MEMORY:
        return free
    import psutil

    return min(free, int(psutil.virtual_memory().available))


def _idle(folder: Path) -> bool:
    """True if no process has an arena open; a half made one counts as idle."""
    try:
        fd = os.open(folder / _USERS_FILE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(fd)


def _being_written(entry: int) -> bool:
    """True if another process is writing an entry, and has not been killed meanwhile."""
    if entry >= 0 or entry == -os.getpid():
        return False
    try:
        os.kill(-entry, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
