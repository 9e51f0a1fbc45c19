"""A plan's resources against what the cluster has, or can grow to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import ray

from mimray.trainers.config.run import Plan
from mimray.trainers.errors import ResourceError


@dataclass(frozen=True)
class WorkerResources:
    """Resources of each worker."""

    gpus: int
    cpus: float


def preflight(plan: Plan) -> WorkerResources:
    """Check a plan's resources against the cluster.

    Returns:
        Resources of each worker.

    Raises:
        ResourceError: the cluster can never provide them; the message has the arithmetic.
    """
    wanted = plan.recipe.resources
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    gpus = sum(int(n.get("GPU", 0)) for n in nodes)
    limits = autoscaler_limits()
    most_gpus, most_cpus = max(gpus, int(limits.get("GPU", 0))), limits.get("CPU", 0)
    on_gpu = wanted.device == "gpu" or (wanted.device == "auto" and most_gpus > 0)
    least = min(wanted.num_workers.min, plan.world_size)
    if on_gpu and most_gpus < least:
        raise ResourceError(
            f"{least} workers need {least} GPUs, the cluster has {most_gpus}",
            hint=f"--workers {max(1, most_gpus)}, or --set resources.device=cpu",
        )
    per_node = [min(n.get("CPU", 0), n.get("GPU", 0)) if on_gpu else n.get("CPU", 0) for n in nodes]
    # An elastic run shares the nodes there are among the workers that they can hold.
    slots = sum(int(n.get("GPU" if on_gpu else "CPU", 0)) for n in nodes)
    at_once = plan.world_size if limits else min(plan.world_size, max(least, slots))
    decoders = _decoders(plan)
    cpus = wanted.cpus_per_worker or _fair_cpus(nodes, limits, at_once, on_gpu, at_once * decoders)
    fits = sum(
        int(min(n.get("CPU", 0) // cpus, n.get("GPU", 0) if on_gpu else 1_000_000)) for n in nodes
    )
    if fits < least and most_cpus < least * cpus:
        shown = " + ".join(f"{n:g}" for n in per_node if n) or "0"
        raise ResourceError(
            f"{least} workers x {cpus:g} CPUs = {least * cpus:g} CPUs; "
            f"the cluster has {shown} and fits {fits} such workers",
            hint=f"--workers {max(1, fits)}, or --set resources.cpus_per_worker=1",
        )
    there = max(sum(int(n.get("CPU", 0)) for n in nodes), int(most_cpus))
    if decoders and least * (cpus + decoders) > there:
        raise ResourceError(
            f"data.stream ray: {least} workers x ({cpus:g} CPUs + {decoders} to decode) = "
            f"{least * (cpus + decoders):g} CPUs; the cluster has {there}",
            hint="a smaller data.num_workers or resources.cpus_per_worker, or "
            "--set data.stream=local",
        )
    return WorkerResources(gpus=int(on_gpu), cpus=cpus)


def _decoders(plan: Plan) -> int:
    """Actors that decode for each worker, beside it or elsewhere, of a CPU each."""
    data = plan.recipe.data
    return data.num_workers if data.stream == "ray" else 0


def _fair_cpus(
    nodes: list[dict[str, float]],
    limits: Mapping[str, float],
    num_workers: int,
    on_gpu: bool,
    num_decoders: int = 0,
) -> int:
    """The largest whole number of CPUs that all workers can have at once, beside the decoders.

    Where the nodes there are do not hold them all, it is an equal share of what the cluster may
    grow to.
    """
    slots = [(int(n.get("CPU", 0)), int(n.get("GPU", 0)) if on_gpu else 1_000_000) for n in nodes]
    total = sum(c for c, _ in slots)
    for cpus in range(max((c for c, _ in slots), default=1), 0, -1):
        enough = num_workers * cpus + num_decoders <= total
        if enough and sum(min(c // cpus, g) for c, g in slots) >= num_workers:
            return cpus
    shares = limits.get("GPU", 0) if on_gpu else num_workers
    return max(1, int((limits.get("CPU", 0) - num_decoders) // max(1, shares)))


def autoscaler_limits() -> dict[str, float]:
    """Resources of an autoscaling cluster at its largest; empty without autoscaling."""
    from ray._private.state import state

    return state.get_max_resources_from_cluster_config() or {}
