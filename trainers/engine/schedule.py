"""Learning rate by step."""

from __future__ import annotations

import math

from trainers.config.run import Plan


def learning_rate(plan: Plan, step: int) -> float:
    """Linear warm-up from zero, then half a cosine down to `min_lr`; set before each update.

    Args:
        plan: peak, warm-up and length.
        step: updates made so far.

    Source: Loshchilov & Hutter 2017; per update rather than per epoch, as He et al. 2022, A.1.
    """
    if step < plan.warmup_steps:
        return plan.lr * step / plan.warmup_steps
    progress = (step - plan.warmup_steps) / (plan.steps - plan.warmup_steps)
    floor = plan.recipe.optim.min_lr
    return floor + (plan.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))
