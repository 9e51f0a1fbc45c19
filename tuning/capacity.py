"""Resources of a trial and trials at once, counted before anything starts.

A trial of one worker trains in its own process and holds that worker's devices. A trial of several
starts a `TorchTrainer`, whose workers are a placement group of their own; the trial's process then
holds no CPU, so that all CPUs are the workers'. Without the count, a trial could wait for ever.
"""

from __future__ import annotations

from dataclasses import dataclass

import ray

from mimray.trainers.errors import ResourceError
from mimray.trainers.preflight import autoscaler_limits
from mimray.tuning.config import TrialResources

_NO_LIMIT = 1_000_000
# Tune refuses a request for nothing; this resource is on the head of every cluster.
_TOKEN = {"node:__internal_head__": 0.0001}


@dataclass(frozen=True)
class Capacity:
    """The resources of a trial, and the number of trials at once.

    Attributes:
        num_workers: training workers of a trial.
        cpus: CPUs of each worker.
        gpus: GPUs of each worker; a fraction is shared with other trials.
        concurrent: trials at once.
        arithmetic: the count, as a line for people.
    """

    num_workers: int
    cpus: int
    gpus: float
    concurrent: int
    arithmetic: str

    @property
    def devices(self) -> float:
        """Devices of a trial: GPUs, or CPUs where there is no GPU."""
        return self.num_workers * (self.gpus or self.cpus)

    @property
    def tune(self) -> dict[str, float]:
        """The resources that Tune sets aside for the trial's own process."""
        if self.num_workers > 1:
            return dict(_TOKEN)
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


def count(wanted: TrialResources, num_trials: int | None, concurrent: int | None) -> Capacity:
    """Hold a sweep against the cluster that Ray is connected to.

    Args:
        wanted: the resources that a trial asks for.
        num_trials: trials in the whole sweep, where that is known.
        concurrent: trials at once; as many as fit by default.

    Raises:
        ResourceError: with the arithmetic, when not one trial, or not so many, can ever run.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    limits = autoscaler_limits()
    num_gpus = sum(node.get("GPU", 0) for node in nodes) or limits.get("GPU", 0)
    gpus = wanted.gpus_per_worker or (1.0 if num_gpus else 0.0)
    if gpus != int(gpus) and (gpus > 1 or wanted.num_workers > 1):
        raise ResourceError(
            f"resources.gpus_per_worker {gpus:g}: a GPU is shared by trials of one worker only",
            hint="a whole number, or resources.num_workers=1",
        )
    cpus = wanted.cpus_per_worker or _fair_cpus(nodes, wanted, gpus, num_trials, concurrent)
    slots = _slots(nodes, cpus, gpus)
    fits = slots // wanted.num_workers
    per_worker = f"{cpus} CPU{'s' if cpus > 1 else ''}" + (f" and {gpus:g} GPU" if gpus else "")
    workers = f"{wanted.num_workers} worker{'s' if wanted.num_workers > 1 else ''}"
    has = " + ".join(
        f"{node.get('CPU', 0):g} CPUs" + (f" and {node['GPU']:g} GPUs" if node.get("GPU") else "")
        for node in nodes
    )
    arithmetic = f"a trial = {workers} x {per_worker}; the cluster has {has}, which fits {fits}"
    if limits:  # the cluster grows: the nodes of now decide the start alone
        grown = _slots([limits], cpus, gpus) // wanted.num_workers
        fits, arithmetic = max(fits, grown), f"{arithmetic} (and {grown} once it has grown)"
    if fits < 1:
        raise ResourceError(
            f"not one trial can run: {arithmetic}",
            hint="fewer resources.num_workers, cpus_per_worker or gpus_per_worker",
        )
    if concurrent is not None and concurrent > fits:
        raise ResourceError(
            f"--concurrent {concurrent} cannot be: {arithmetic}", hint=f"--concurrent {fits}"
        )
    at_once = min(concurrent or fits, num_trials or fits)
    return Capacity(wanted.num_workers, cpus, gpus, at_once, f"{arithmetic}, {at_once} run at once")


def _fair_cpus(
    nodes: list[dict[str, float]],
    wanted: TrialResources,
    gpus: float,
    num_trials: int | None,
    concurrent: int | None,
) -> int:
    """CPUs of a worker: the share beside its GPU; else all CPUs over the trials at once."""
    if gpus:
        with_gpu = [node for node in nodes if node.get("GPU")]
        shares = [int(node.get("CPU", 1) / node["GPU"] * gpus) for node in with_gpu]
        return max(1, min(shares, default=1))
    total = int(sum(node.get("CPU", 0) for node in nodes))
    at_once = concurrent or min(num_trials or total, total) or 1
    for cpus in range(max(1, total // (at_once * wanted.num_workers)), 1, -1):
        if _slots(nodes, cpus, 0) >= at_once * wanted.num_workers:
            return cpus
    return 1


def _slots(nodes: list[dict[str, float]], cpus: int, gpus: float) -> int:
    """Workers that fit; none spans two nodes."""

    def on(node: dict[str, float]) -> int:
        by_gpu = _NO_LIMIT
        if gpus >= 1:
            by_gpu = int(node.get("GPU", 0) // gpus)
        elif gpus:
            by_gpu = int(node.get("GPU", 0)) * int(1 / gpus + 1e-9)
        return min(int(node.get("CPU", 0) // cpus), by_gpu)

    return sum(map(on, nodes))
