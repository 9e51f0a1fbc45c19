"""Row groups at hand: a bounded part in memory, and for remote data a bounded part on disk."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa

logger = logging.getLogger(__name__)

MEMORY_BYTES = 256 << 20
_NUM_LOCKS = 64


def user_cache(name: str) -> Path:
    """Folder of one kind of thing in the user's cache, e.g. `row-groups` or `features`."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base, "mimray", name)


class MemoryCache:
    """Tables in memory up to `max_bytes`: the least recently used go first, the newest stays."""

    def __init__(self, max_bytes: int = MEMORY_BYTES) -> None:
        self._max_bytes = max_bytes
        self._tables: OrderedDict[str, pa.Table] = OrderedDict()
        self._num_bytes = 0

    def get(self, key: str, load: Callable[[], pa.Table]) -> pa.Table:
        """Return the table kept under `key`, loading it when there is none."""
        if key in self._tables:
            self._tables.move_to_end(key)
            return self._tables[key]
        table = load()
        self._tables[key] = table
        self._num_bytes += table.nbytes
        while self._num_bytes > self._max_bytes and len(self._tables) > 1:
            _, dropped = self._tables.popitem(last=False)
            self._num_bytes -= dropped.nbytes
        return table


class DiskCache:
    """Arrow files in one folder that several processes share.

    A file appears by a rename, so it is whole or absent, and is read without a lock. Of several
    processes that miss the same one, one loads it and the others wait. A read renews its
    modification time; when the folder outgrows `max_mib`, the files unread for longest are deleted.
    On Linux a process that still has a deleted file mapped keeps its bytes.

    Args:
        folder: folder of the files, made when first written to.
        max_mib: bound of the whole folder; a single larger table is kept until the next one.
    """

    def __init__(self, folder: str, max_mib: int) -> None:
        self._folder = Path(folder)
        self._max_bytes = max_mib << 20

    def get(self, key: str, load: Callable[[], pa.Table]) -> pa.Table:
        """Return the table kept under `key` (a file name's worth of text), or load and keep it."""
        path = self._folder / f"{key}.arrow"
        table = self._read(path)
        if table is None:
            with self._loading(key):
                table = self._read(path)
                if table is None:
                    table = load()
                    self._write(path, table)
        return table

    @contextlib.contextmanager
    def _loading(self, key: str) -> Iterator[None]:
        """Keep other processes from loading the same key; they may wait for another key, too."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # Without a lock it may be loaded twice, no more.
                self._folder.mkdir(parents=True, exist_ok=True)
                lock = self._folder / f"{zlib.crc32(key.encode()) % _NUM_LOCKS}.lock"
                fcntl.flock(stack.enter_context(lock.open("a")), fcntl.LOCK_EX)
            yield

    def _read(self, path: Path) -> pa.Table | None:
        try:
            os.utime(path)
            with pa.memory_map(str(path)) as source:
                return pa.ipc.open_file(source).read_all()
        except FileNotFoundError:
            return None
        except (pa.ArrowInvalid, OSError) as error:
            logger.warning("the cached row group %s is damaged and read again: %s", path, error)
            return None

    def _write(self, path: Path, table: pa.Table) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(dir=self._folder, suffix=".part")
            os.close(handle)
            try:
                with pa.OSFile(part, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                    writer.write_table(table)
                os.replace(part, path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(part)
            self._evict()
        except OSError as error:  # A cache that cannot be written costs time, not the run.
            logger.warning("row groups are not kept in %s: %s", self._folder, error)

    def _evict(self) -> None:
        entries = []
        for entry in os.scandir(self._folder):
            if entry.name.endswith(".lock"):
                continue
            with contextlib.suppress(FileNotFoundError):  # Another process evicted it.
                facts = entry.stat()
                entries.append((facts.st_mtime_ns, facts.st_size, entry.path))
        excess = sum(size for _, size, _ in entries) - self._max_bytes
        for _, size, path in sorted(entries)[:-1]:
            if excess <= 0:
                return
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            excess -= size
