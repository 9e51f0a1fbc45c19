"""Learning rate by step."""

from __future__ import annotations

import math

from mimray.trainers.config.run import Plan


def learning_rate(plan: Plan, step: int) -> float:
    """Linear warm-up, then half a cosine down to `min_lr`, or falls at milestones.

    A run that was made longer has the rates of its new length from the step on at which it was.

    Args:
        plan: the run's plan, with its peak, warm-up and length.
        step: updates made before this one.

    Source: Loshchilov & Hutter 2017; per update rather than per epoch, as the official MAE code.
        Falls by `gamma` at shares of the run as the official SimMIM code (`lr_scheduler.py`).
    """
    optim, length = plan.recipe.optim, plan.length_at(step)
    if step < plan.warmup_steps:
        return optim.warmup_lr + (plan.lr - optim.warmup_lr) * step / plan.warmup_steps
    if optim.schedule == "multistep":
        falls = sum(step >= round(share * length) for share in optim.milestones)
        return max(optim.min_lr, plan.lr * optim.gamma**falls)
    progress = (step - plan.warmup_steps) / (length - plan.warmup_steps)
    return optim.min_lr + (plan.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
