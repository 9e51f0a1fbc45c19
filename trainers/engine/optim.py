"""The optimiser and its parameter groups."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from trainers.config.optim import OptimConfig


def parameter_groups(
    module: nn.Module, weight_decay: float, no_decay: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Weights decay; biases and norms (anything of one dimension) do not, nor what is named.

    Class and mask tokens have three dimensions and decay, as in the official MAE code, unless
    a recipe names them.

    Args:
        module: frozen parameters are left out.
        weight_decay: of the first group.
        no_decay: last parts of the names of parameters that do not decay.

    Source: He et al. 2022, A.1; the grouping is timm's.
    """
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            # ZeRO-3 leaves empty shards in place of parameters; ds_shape is the real one.
            shape = getattr(parameter, "ds_shape", parameter.shape)
            spared = len(shape) <= 1 or name.rsplit(".", 1)[-1] in no_decay
            groups[spared].append(parameter)
    return [
        {"params": groups[0], "weight_decay": weight_decay},
        {"params": groups[1], "weight_decay": 0.0},
    ]


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the groups above; the learning rate is set before every update."""
    return torch.optim.AdamW(
        parameter_groups(module, config.weight_decay, config.no_decay),
        lr=config.base_lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
