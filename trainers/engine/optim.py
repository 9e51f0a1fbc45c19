"""The optimiser and its parameter groups."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from mimray.trainers.config.optim import OptimConfig
from mimray.trainers.methods.base import Method

_ENCODER = "encoder."


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    no_decay: Collection[str] = (),
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Groups of one layer and one weight decay; `lr_scale` is what the learning rate is times.

    Weights decay; biases and norms (anything of one dimension) do not, nor what is named. Class
    and mask tokens have three dimensions and decay, as in the official MAE code, unless a recipe
    names them.

    Args:
        module: frozen parameters are left out.
        weight_decay: of what decays.
        no_decay: last parts of the names of parameters that do not decay.
        layer_decay: `lr_scale` of a layer of the encoder over that of the next; what lies behind
            the encoder has 1. None: one layer. Takes a method as module.

    Source: He et al. 2022, A.1; the grouping is timm's. Layer-wise decay by Clark et al. 2020
        (ELECTRA), sec. 3.1, as in Bao et al. 2022 (BEiT), A.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            # ZeRO-3 leaves empty shards in place of parameters; ds_shape is the real one.
            shape = getattr(parameter, "ds_shape", parameter.shape)
            spared = len(shape) <= 1 or name.rsplit(".", 1)[-1] in no_decay
            height = 0 if layer_decay is None else _layers_above(module, name)
            group = groups.setdefault(
                (-height, spared),
                {
                    "params": [],
                    "weight_decay": 0.0 if spared else weight_decay,
                    "lr_scale": (layer_decay or 1.0) ** height,
                },
            )
            group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the groups above; the learning rate is set before every update."""
    return torch.optim.AdamW(
        parameter_groups(module, config.weight_decay, config.no_decay, config.layer_decay),
        lr=config.base_lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Give each group its share of the rate of this update.

    Args:
        optimizer: of `build_optimizer`, or DeepSpeed's around it.
        learning_rate: of a group whose `lr_scale` is 1.
    """
    for group in optimizer.param_groups:
        # Checkpoints from before there was layer-wise decay bring groups without a scale.
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


def _layers_above(method: nn.Module, name: str) -> int:
    """Layers between a parameter and the head, 0 for all that is not in the encoder."""
    assert isinstance(method, Method)
    if not name.startswith(_ENCODER):
        return 0
    encoder = method.encoder
    return encoder.last_decay_layer - encoder.decay_layer(name.removeprefix(_ENCODER))
