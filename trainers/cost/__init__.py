"""Cost of a plan before it runs: parameters, FLOPs, tokens, device memory.

In order: `step` traces one training step, `memory` adds the states that DeepSpeed holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from mimray.trainers.bundles import BundleCard
from mimray.trainers.config.run import Plan
from mimray.trainers.cost.memory import (
    KEPT_WHOLE,
    REDUCE_BUCKET,
    Memory,
    Setting,
    Weights,
    memory_of,
)
from mimray.trainers.cost.step import REST, Step, part_names, shape_of, trace
from mimray.trainers.engine.deepspeed import AUTOCAST, DTYPES, deepspeed_config
from mimray.trainers.methods.base import Method

ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Cost:
    """Parameters, FLOPs and memory of a plan.

    Attributes:
        parameters: number of parameters by part of the method, fixed ones included.
        plain: one step without activation checkpointing.
        checkpointed: one step with activation checkpointing.
        memory: memory of one device, by ZeRO stage and activation checkpointing.
        reduce_bucket: elements of DeepSpeed's bucket for gradients.
        trained: elements that the optimiser updates.
        average_bytes: bytes of the average that `optim.ema` keeps, in the parameters' memory.
    """

    parameters: dict[str, int]
    plain: Step
    checkpointed: Step
    memory: dict[tuple[int, bool], Memory]
    reduce_bucket: int
    trained: int
    average_bytes: int = 0


def estimate(
    plan: Plan,
    precision: str,
    *,
    on_gpu: bool = True,
    networks: Mapping[str, BundleCard] | None = None,
) -> Cost:
    """Estimate FLOPs and memory of a plan's step, at its micro batch and number of workers.

    Nothing is allocated or computed, so that any model can be estimated on any machine.

    Args:
        plan: the plan to estimate.
        precision: a result of `choose_precision`.
        on_gpu: True for the memory of a GPU, False for that of a CPU worker.
        networks: cards of the networks that the method calls but does not own, by the folder of
            their need; one that is missing costs nothing.
    """
    dtype = DTYPES[precision]
    method = shape_of(plan.recipe, dtype, networks or {})
    steps = {
        again: trace(
            method,
            plan.micro_batch_size,
            checkpointing=again,
            on_gpu=on_gpu,
            autocast=AUTOCAST.get(precision),
        )
        for again in (False, True)
    }
    config: dict[str, Any] = deepspeed_config(plan, precision)["zero_optimization"]
    bucket = int(config.get("reduce_bucket_size", REDUCE_BUCKET))
    weights = _weights(method)
    memory = {
        (stage, again): memory_of(
            weights,
            step,
            Setting(
                zero_stage=stage,
                num_workers=plan.world_size,
                element_bytes=dtype.itemsize,
                accumulation=plan.accumulation,
                reduce_bucket=bucket,
                on_gpu=on_gpu,
                offload=_offload_at(stage, plan),
            ),
        )
        for again, step in steps.items()
        for stage in ZERO_STAGES
    }
    return Cost(
        parameters=_by_part(method),
        plain=steps[False],
        checkpointed=steps[True],
        memory=memory,
        reduce_bucket=bucket,
        trained=weights.trained,
        average_bytes=0 if method.ema is None else sum(b.nbytes for b in method.ema.buffers()),
    )


def _offload_at(stage: int, plan: Plan) -> str:
    """The state that a recipe offloads, as far as a ZeRO stage can."""
    wanted = plan.recipe.engine.offload
    if stage == 0:
        return "none"
    return "optimizer" if wanted == "all" and stage < 3 else wanted


def _weights(method: Method) -> Weights:
    sizes = [(p.numel(), p.requires_grad) for p in method.parameters()]
    fixed = [*method.buffers()]
    owned = set(method.modules())
    for module in (m for modules in method.parts().values() for m in modules):
        if module not in owned:
            fixed += [*module.parameters(), *module.buffers()]
    return Weights(
        trained=sum(n for n, trained in sizes if trained),
        frozen=sum(n for n, trained in sizes if not trained),
        small=sum(n for n, _ in sizes if n <= KEPT_WHOLE),
        fixed_bytes=sum(tensor.nbytes for tensor in fixed),
    )


def _by_part(method: Method) -> dict[str, int]:
    """Parameters of each part; the rest are those that the method owns and no part has."""
    counts = {
        part: sum(_count(module) for module in modules) for part, modules in method.parts().items()
    }
    owned = set(method.parameters())
    named = {p for modules in method.parts().values() for m in modules for p in m.parameters()}
    counts[REST] = sum(parameter.numel() for parameter in owned - named)
    return {part: counts[part] for part in part_names(method)}


def _count(module: nn.Module) -> int:
    """Number of parameters; of a moving average, of the buffers in their place."""
    averaged = (b for b in module.buffers() if b.is_floating_point())
    return sum(p.numel() for p in module.parameters()) or sum(b.numel() for b in averaged)
