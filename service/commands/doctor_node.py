"""The part of `mimray doctor --cluster` that runs on each node of a cluster.

It is sent by value and needs the standard library alone to start, so that a node without mimray, or
with another version of it, can say so. A result that a node sends is of built-in types for the
same reason.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

PACKAGES = ("mimray", "ray", "torch", "deepspeed", "timm", "pyarrow")
MISSING = "missing"
CONNECT_TIMEOUT_S = 5.0
NUM_SUMS = 5

Place = tuple[str, int]


class NodeProbe:
    """Looks at the node that it runs on; an actor of several threads, so that one may be stuck."""

    def __init__(self) -> None:
        self._made: list[Path] = []
        self._listener: socket.socket | None = None
        self._store: Any = None

    def clock(self) -> float:
        """The node's time, seconds since 1970."""
        return time.time()

    def facts(self) -> dict[str, Any]:
        """Versions, the number of GPUs that torch sees, and the checks that each node must pass.

        Returns:
            `versions`: version by package, `python` included. `gpus`: their number; None without
            torch. `checks`: status, detail and cure by the name of a check; empty without mimray.
        """
        return {"versions": versions(), "gpus": _gpus(), "checks": _checks()}

    def write(self, storage: str, folder: str, name: str) -> None:
        """Write a small file below the storage, whose content is its name."""
        from mimray.trainers.storage import RunDir

        place = RunDir(storage)
        if place.local is not None:
            above = (place.local, *place.local.parents)
            self._made = [path for path in above if not path.exists()]
        place.write(f"{folder}/{name}", name.encode())

    def unseen(self, storage: str, folder: str, names: list[str]) -> list[str]:
        """Read what others wrote; returns the names of those whose file is not seen from here."""
        from mimray.trainers.storage import RunDir

        place = RunDir(storage) / folder
        return [
            name for name in names if not place.exists(name) or place.read(name) != name.encode()
        ]

    def remove(self, storage: str, folder: str) -> None:
        """Remove the files of all, as they are seen from here, and the folders made for them."""
        from mimray.trainers.storage import RunDir

        RunDir(storage).delete(folder)
        with contextlib.suppress(OSError):  # somebody else uses one of them by now
            for path in self._made:
                path.rmdir()

    def listen(self) -> Place:
        """Listen on a free port of the node's address; returns both."""
        import ray

        self._listener = socket.create_server((ray.util.get_node_ip_address(), 0), backlog=1024)
        host, port = self._listener.getsockname()[:2]
        return host, port

    def unreached(self, places: Mapping[str, Place]) -> dict[str, str]:
        """Connect to other nodes; returns the reasons by the names of those not reached."""
        with ThreadPoolExecutor(min(32, len(places))) as pool:
            reasons = list(pool.map(_refusal, places.values()))
        return {name: reason for name, reason in zip(places, reasons, strict=True) if reason}

    def host_meeting(self, num_nodes: int, timeout_s: float) -> Place:
        """Open the store at which a process group meets; returns its address."""
        import ray
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        host = ray.util.get_node_ip_address()
        limit = timedelta(seconds=timeout_s)
        self._store = TCPStore(host, 0, num_nodes, True, limit, wait_for_workers=False)
        return host, self._store.port

    def sum_up(
        self, place: Place, rank: int, num_nodes: int, backend: str, mib: int, timeout_s: float
    ) -> float:
        """Sum a tensor over all nodes, as workers do with gradients; collective.

        Args:
            place: a result of `host_meeting`, on rank 0.
            rank: this node's rank.
            num_nodes: number of nodes that take part.
            backend: `gloo` or `nccl`.
            mib: size of the tensor, MiB.
            timeout_s: seconds to wait for the others.

        Returns:
            The median of seconds that a sum takes.
        """
        import torch
        import torch.distributed as dist
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        limit = timedelta(seconds=timeout_s)
        store = self._store or TCPStore(*place, num_nodes, False, limit)
        device = torch.device("cuda:0" if backend == "nccl" else "cpu")
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=num_nodes, timeout=limit
        )
        try:
            tensor = torch.zeros(mib << 18, device=device)  # of four bytes each
            seconds = []
            for _ in range(NUM_SUMS + 1):
                dist.barrier()
                began = time.perf_counter()
                dist.all_reduce(tensor)
                float(tensor[0])  # waits for a GPU
                seconds.append(time.perf_counter() - began)
            dist.barrier()  # the first to be done must not close the store
            return median(seconds[1:])  # the first one connects
        finally:
            dist.destroy_process_group()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that all nodes must share, `missing` without one."""
    return {
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str:
    if package == "mimray":  # a checkout is not installed, and its code is more than its version
        try:
            import mimray
        except ImportError:
            return MISSING
        return f"{mimray.__version__}+code.{_digest(Path(mimray.__file__).parent)}"
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return MISSING


def _digest(package: Path) -> str:
    """A digest of a package's code, links followed."""
    digest = hashlib.sha256()
    for folder, below, files in os.walk(package, followlinks=True):
        below.sort()
        for name in sorted(files):
            if name.endswith((".py", ".yaml")):
                file = Path(folder, name)
                digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:7]


def _gpus() -> int | None:
    try:
        import torch
    except ImportError:
        return None
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _checks() -> dict[str, tuple[str, ...]]:
    with contextlib.suppress(ImportError):
        from mimray.service.commands import doctor_checks

        return {
            "shared memory": tuple(doctor_checks.check_shared_memory()),
            "open files": tuple(doctor_checks.check_open_files()),
        }
    return {}


def _refusal(place: Place) -> str:
    try:
        socket.create_connection(place, CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""
