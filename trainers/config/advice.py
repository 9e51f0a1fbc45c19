"""Warnings about a plan: settings that pass every check and are still unlikely to train well."""

from __future__ import annotations

import math

from mimray.trainers.config.run import Plan

# Peaks of the published recipes: SimMIM 4e-4 (2048 pictures), BEiT 1.5e-3, MAE 2.4e-3 (4096).
PUBLISHED_LR = (4e-4, 2.4e-3)
LOWEST_LR, HIGHEST_LR = 1e-4, 5e-3
# A fifth of MAE's peak; recipes that go on from public weights peak between 1e-6 and 5e-4.
HIGHEST_INITIAL_LR = 5e-4
FEWEST_STEPS_AN_EPOCH = 4
LARGEST_SHARE_OF_START = 0.05


def advice(plan: Plan) -> list[str]:
    """Warnings about a plan, a sentence each, with the numbers and a better setting.

    Args:
        plan: a resolved plan, which has passed every check.

    Returns:
        The warnings; empty if there are none.
    """
    rows, columns = plan.recipe.grid
    of_method = plan.recipe.method.advice(rows * columns, plan.global_batch)
    return [
        *_on_precision(plan),
        *_on_lr(plan),
        *_on_initial(plan),
        *_on_length(plan),
        *_on_average(plan),
        *of_method,
    ]


def _on_precision(plan: Plan) -> list[str]:
    if plan.recipe.engine.precision != "fp16":
        return []
    return [
        "engine.precision fp16 overflows at 65504, which attention scores reach in masked image "
        "modelling, and the loss becomes NaN; bf16 has the range of fp32: "
        "--set engine.precision=bf16"
    ]


def _on_lr(plan: Plan) -> list[str]:
    optim, low, high = plan.recipe.optim, *PUBLISHED_LR
    reached = (
        f"the peak learning rate is {plan.lr:.3g} = optim.base_lr {optim.base_lr:g} x "
        f"batch {plan.global_batch} / 256"
    )
    published = f"published recipes peak between {low:g} and {high:g}"
    # Weights to begin with want lower rates than any of the published runs from nothing.
    if plan.lr < LOWEST_LR and not plan.recipe.method.init:
        return [
            f"{reached}; {published}. The batch is too small for this base_lr and little will be "
            f"learnt: a larger optim.batch_size, or --set optim.base_lr={_base_lr(plan, low)}"
        ]
    if plan.lr > HIGHEST_LR:
        return [
            f"{reached}; {published}. AdamW is likely to diverge: "
            f"--set optim.base_lr={_base_lr(plan, high)}"
        ]
    return []


def _on_initial(plan: Plan) -> list[str]:
    """On rates that change trained weights as fast as fresh ones."""
    method, optim = plan.recipe.method, plan.recipe.optim
    if not method.init or optim.layer_decay is not None:
        return []
    found = []
    if plan.lr > HIGHEST_INITIAL_LR:
        found.append(
            f"the run begins with trained weights, and a peak learning rate of {plan.lr:.3g} is "
            f"for fresh ones: --set optim.base_lr={_base_lr(plan, HIGHEST_INITIAL_LR)}, or "
            "--set optim.layer_decay=0.75, keeps more of them"
        )
    if not plan.warmup_steps and plan.steps > 1:
        found.append(
            "the run begins with trained weights at the full learning rate, before Adam has an "
            f"average of their gradients: --set optim.warmup_steps={max(1, plan.steps // 20)}"
        )
    return found


def _base_lr(plan: Plan, lr: float) -> str:
    return f"{lr * 256 / plan.global_batch:.1e}"


def _on_length(plan: Plan) -> list[str]:
    found = []
    if plan.steps_per_epoch < FEWEST_STEPS_AN_EPOCH:
        found.append(
            f"a global batch of {plan.global_batch} is {1 / plan.steps_per_epoch:.0%} of the "
            f"{plan.data.num_samples} pictures, so that an epoch is {plan.steps_per_epoch:.1f} "
            f"updates: a smaller optim.batch_size makes more of the same pictures"
        )
    if plan.warmup_steps > plan.steps / 2:
        found.append(
            f"{plan.warmup_steps} of {plan.steps} steps are warm-up, so that the peak learning "
            "rate is hardly used: --set optim.warmup_steps="
            f"{plan.steps // 10}, or a longer run"
        )
    return found


def _on_average(plan: Plan) -> list[str]:
    """Warn of an average that has not forgotten where it began by the end of the run."""
    key, momentum = "optim.ema", plan.recipe.optim.ema
    if momentum is None:
        key, momentum = "method.momentum", plan.recipe.method.exported_momentum
    if momentum is None:
        return []
    every = max(1, plan.steps // 1000)  # a schedule is smooth
    logs = [
        math.log(max(momentum.at(step, plan.steps), 1e-9)) for step in range(0, plan.steps, every)
    ]
    left = math.exp(every * sum(logs))
    if left <= LARGEST_SHARE_OF_START:
        return []
    return [
        f"{key} averages over longer than the run: {left:.0%} of the exported weights are the "
        f"start's; --set {key}={_ema_for(plan.steps)} forgets them in {plan.steps} steps"
    ]


def _ema_for(steps: int) -> str:
    return f"{1 - min(0.5, 10 / steps):.6g}"
