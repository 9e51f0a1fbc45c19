"""The optimiser and its parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trainers.config.optim import OptimConfig


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights decay; biases and norms (anything of one dimension) do not.

    Class and mask tokens have three dimensions and decay, as in the official MAE code.

    Args:
        module: frozen parameters are left out.
        weight_decay: of the first group.

    Source: He et al. 2022, A.1; the grouping is timm's.
    """
    # ZeRO-3 leaves empty shards in place of parameters; ds_shape is the real one.
    trained = [(getattr(p, "ds_shape", p.shape), p) for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for shape, p in trained if len(shape) > 1], "weight_decay": weight_decay},
        {"params": [p for shape, p in trained if len(shape) <= 1], "weight_decay": 0.0},
    ]


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the groups above; the learning rate is set before every update."""
    return torch.optim.AdamW(
        parameter_groups(module, config.weight_decay),
        lr=config.base_lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
