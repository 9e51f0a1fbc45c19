"""CPUs and memory within control groups of both versions, however deep."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from mimray.trainers.environment.limits import (
    available_memory,
    free_shared_memory,
    memory_limit,
    usable_cpus,
)

GIB = 2**30


@pytest.fixture(autouse=True)
def _large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    memory = psutil.virtual_memory()._replace(total=256 * GIB, available=200 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def machine(root: Path, groups: str, files: dict[str, str]) -> Path:
    """A root folder with the groups of this process and files of the group tree."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "cpus"),
    [
        # A container: its group is the root of what it sees.
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        # A job of a batch system: the limit lies in a group of its own, or above it.
        ("0::/slurm/job_7/step_0\n", {"slurm/job_7/cpu.max": "400000 100000\n"}, 4),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "800000 100000\n"}, 3),
        # The path on the host, told to a container that sees its own group only.
        ("0::/kubepods/pod7\n", {"cpu.max": "600000 100000\n"}, 6),
        # Version 1, and both at once.
        (
            "4:cpu,cpuacct:/job\n1:name=systemd:/\n",
            {"cpu/job/cpu.cfs_quota_us": "500000\n", "cpu/job/cpu.cfs_period_us": "100000\n"},
            5,
        ),
        (
            "4:cpu:/job\n0::/\n",
            {
                "cpu/job/cpu.cfs_quota_us": "-1\n",
                "cpu/job/cpu.cfs_period_us": "100000\n",
                "unified/cgroup.procs": "",
            },
            64,
        ),
        ("", {}, 64),
    ],
)
def test_usable_cpus(tmp_path: Path, groups: str, files: dict[str, str], cpus: int) -> None:
    assert usable_cpus(machine(tmp_path, groups, files)) == cpus


def test_usable_cpus__within_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = machine(tmp_path, "0::/\n", {"cpu.max": "800000 100000\n"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert usable_cpus(root) == 2


@pytest.mark.parametrize(
    ("groups", "files", "limit_gib", "available_gib"),
    [
        ("0::/\n", {"memory.max": "max\n"}, 256, 200),
        (
            "0::/\n",
            {
                "memory.max": f"{8 * GIB}\n",
                "memory.current": f"{5 * GIB}\n",
                "memory.stat": f"anon 1\ninactive_file {2 * GIB}\n",
            },
            8,
            5,
        ),
        (
            "0::/slurm/job\n",
            {
                "slurm/memory.max": f"{16 * GIB}\n",
                "slurm/memory.current": f"{15 * GIB}\n",
                "slurm/job/memory.max": f"{8 * GIB}\n",
                "slurm/job/memory.current": f"{GIB}\n",
            },
            8,
            1,
        ),
        (
            "9:memory:/job\n",
            {
                "memory/job/memory.limit_in_bytes": f"{4 * GIB}\n",
                "memory/job/memory.usage_in_bytes": f"{3 * GIB}\n",
                "memory/job/memory.stat": f"total_inactive_file {GIB}\n",
            },
            4,
            2,
        ),
        ("9:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 256, 200),
    ],
)
def test_memory(
    tmp_path: Path, groups: str, files: dict[str, str], limit_gib: int, available_gib: int
) -> None:
    root = machine(tmp_path, groups, files)
    assert memory_limit(root) == limit_gib * GIB
    assert available_memory(root) == available_gib * GIB


def test_shared_memory__none_is_zero(tmp_path: Path) -> None:
    assert free_shared_memory(tmp_path / "absent") == 0
    assert free_shared_memory(tmp_path) > 0
