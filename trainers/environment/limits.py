"""CPUs, memory and shared memory of this process, within affinity and its control groups.

Ray and Python look at the machine, or at the root of the control groups. That is right in a
container and wrong in a job of a batch system, whose group lies deeper.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
# Version 1 writes the largest whole number of pages where there is no limit.
_UNLIMITED = 2**60


def usable_cpus(root: Path = Path("/")) -> int:
    """CPUs that this process may use: those it may run on, within its quota; at least 1.

    Args:
        root: the folder that holds `proc` and `sys`.
    """
    cpus = float(len(os.sched_getaffinity(0)))
    for folder in _groups(root, "cpu"):
        words = (_text(folder / "cpu.max") or "").split()
        if not words:
            words = [_text(folder / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
        if all(word.isdigit() for word in words):  # `max` and -1 are no limit
            cpus = min(cpus, int(words[0]) / int(words[1]))
    return max(1, int(cpus))


def memory_limit(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may use in all: the machine's, or its group's limit.

    Args:
        root: the folder that holds `proc` and `sys`.
    """
    import psutil

    limits = [limit for limit, _ in _memory(root)]
    return min([int(psutil.virtual_memory().total), *limits])


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of memory available now, of the machine and within every group's limit.

    Args:
        root: the folder that holds `proc` and `sys`.
    """
    import psutil

    rest = [limit - used for limit, used in _memory(root)]
    return max(0, min([int(psutil.virtual_memory().available), *rest]))


def free_shared_memory(folder: Path = SHARED_MEMORY) -> int:
    """Free bytes of shared memory; 0 where there is none, or none that can be written."""
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return 0
    return shutil.disk_usage(folder).free


def _memory(root: Path) -> Iterator[tuple[int, int]]:
    """The limit of each group that has one, and what of it is in use and cannot be reclaimed."""
    for folder in _groups(root, "memory"):
        for limit_file, usage_file, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit = _text(folder / limit_file)
            if limit is None or not limit.isdigit() or int(limit) >= _UNLIMITED:
                continue
            lines = (_text(folder / "memory.stat") or "").splitlines()
            counts = {
                name: int(count) for name, _, count in (line.partition(" ") for line in lines)
            }
            yield int(limit), int(_text(folder / usage_file) or 0) - counts.get(cache, 0)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of a controller's group of this process and of the groups around it."""
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # Version 2 has one tree for all, which lies aside where version 1 is in use as well.
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        if not controllers and (mount / "unified").is_dir():
            mount /= "unified"
        # A container may be told its path on the host; its own root is its limit then.
        folder = mount / path.strip("/")
        yield from (place for place in (folder, *folder.parents) if place.is_relative_to(mount))


def _text(file: Path) -> str | None:
    try:
        return file.read_text().strip()
    except OSError:
        return None
