"""Learning rate by step."""

from __future__ import annotations

import math

from trainers.config.run import Plan


def learning_rate(plan: Plan, step: int) -> float:
    """Linear warm-up from zero, then half a cosine down to `min_lr` or falls at milestones.

    Args:
        plan: peak, warm-up and length.
        step: updates made so far.

    Source: Loshchilov & Hutter 2017; per update rather than per epoch, as He et al. 2022, A.1.
        Falls by `gamma` at shares of the run as in SimMIM (Xie et al. 2022, sec. 4.1.2).
    """
    optim = plan.recipe.optim
    if step < plan.warmup_steps:
        return plan.lr * step / plan.warmup_steps
    if optim.schedule == "multistep":
        falls = sum(step >= round(share * plan.steps) for share in optim.milestones)
        return max(optim.min_lr, plan.lr * optim.gamma**falls)
    progress = (step - plan.warmup_steps) / (plan.steps - plan.warmup_steps)
    return optim.min_lr + (plan.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
