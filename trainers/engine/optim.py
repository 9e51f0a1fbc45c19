"""The optimiser and its parameter groups."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from mimray.trainers.config.optim import OptimConfig, ParameterGroup
from mimray.trainers.config.run import Plan
from mimray.trainers.engine.schedule import learning_rate
from mimray.trainers.errors import ConfigError
from mimray.trainers.methods.base import Method

_ENCODER = "encoder."
_REST = ParameterGroup(parameters=("*",))


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Groups of one layer, one weight decay and one of the config's `groups`.

    Weights decay; biases and norms (anything of one dimension) do not, nor what `no_decay` names.
    Class and mask tokens have three dimensions and decay, as in the official MAE code, unless a
    recipe names them. With `layer_decay` the rate of a layer of the encoder is that of the next
    one times it; what lies behind the encoder has the full rate.

    Args:
        module: a method; parameters that are not trained are left out.
        config: decay, layer-wise decay and groups.

    Returns:
        Groups for torch, with `lr_scale`, which the learning rate is times; and where the config
        has groups or moves the decay, `of`, the index of the config's group (-1 for none), and
        `spared`, True where nothing decays.

    Raises:
        ConfigError: a group of the config names no parameter that is trained.

    Source: He et al. 2022, A.1; the grouping is timm's. Layer-wise decay by Clark et al. 2020
        (ELECTRA), sec. 3.1, as in Bao et al. 2022 (BEiT), A.
    """
    groups: dict[tuple[int, bool, int], dict[str, Any]] = {}
    moves = bool(config.groups) or not config.weight_decay.constant
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        # ZeRO-3 leaves empty shards in place of parameters; ds_shape is the real one.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        spared = len(shape) <= 1 or name.rsplit(".", 1)[-1] in config.no_decay
        height = 0 if config.layer_decay is None else _layers_above(module, name)
        of = _group_of(name, config)
        own = _own(config, of)
        group = groups.setdefault(
            (-height, spared, of),
            {
                "params": [],
                "weight_decay": 0.0 if spared else (own.weight_decay or config.weight_decay).start,
                "lr_scale": (config.layer_decay or 1.0) ** height * own.lr_scale,
                **({"of": of, "spared": spared} if moves else {}),
            },
        )
        group["params"].append(parameter)
    found = {of for _, _, of in groups}
    for number, rule in enumerate(config.groups):
        if number not in found:
            raise ConfigError(
                f"optim.groups names {', '.join(rule.parameters)}, which is no parameter that is "
                "trained, or one that a group before it names",
                hint="names are those of the method, e.g. encoder.blocks.0.* or head.*",
            )
    return [groups[key] for key in sorted(groups)]


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the groups above; rates and decays are set before every update."""
    return torch.optim.AdamW(
        parameter_groups(module, config),
        lr=config.base_lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def set_hyperparameters(optimizer: Any, plan: Plan, step: int) -> None:
    """Give each group its learning rate and weight decay of one update.

    Args:
        optimizer: of `build_optimizer`, or DeepSpeed's around it.
        plan: schedules and length.
        step: updates made before it.
    """
    rate, optim = learning_rate(plan, step), plan.recipe.optim
    for group in optimizer.param_groups:
        # Checkpoints from before there was layer-wise decay bring groups without a scale.
        group["lr"] = rate * group.get("lr_scale", 1.0)
        if "of" not in group:
            continue
        own = _own(optim, group["of"])
        if step < own.frozen_steps:
            group["lr"] = 0.0  # or weight decay would move what has no gradients
        if not group["spared"]:
            decay = own.weight_decay or optim.weight_decay
            group["weight_decay"] = decay.at(step, plan.steps)


class FrozenGradients:
    """Drops the gradients of the parameters that are frozen at the start of a run.

    They are zeroed as they come, before ZeRO takes them away, and so count in no norm.

    Args:
        module: a method; its parameters are hooked.
        config: whose groups say how long.

    Attributes:
        step: updates made; set before each.

    Source: Caron et al. 2021 (DINO), the official code's `cancel_gradients_last_layer`.
    """

    def __init__(self, module: nn.Module, config: OptimConfig) -> None:
        self.step = 0
        for name, parameter in module.named_parameters():
            until = _own(config, _group_of(name, config)).frozen_steps
            if parameter.requires_grad and until:
                parameter.register_hook(self._dropping(until))  # type: ignore[no-untyped-call]

    def _dropping(self, until: int) -> Any:
        def drop(gradient: Tensor) -> Tensor:
            return torch.zeros_like(gradient) if self.step < until else gradient

        return drop


def _group_of(name: str, config: OptimConfig) -> int:
    """Index of the first group that names a parameter; -1 for none."""
    for number, rule in enumerate(config.groups):
        if any(fnmatchcase(name, pattern) for pattern in rule.parameters):
            return number
    return -1


def _own(config: OptimConfig, of: int) -> ParameterGroup:
    return config.groups[of] if of >= 0 else _REST


def _layers_above(method: nn.Module, name: str) -> int:
    """Layers between a parameter and the head, 0 for all that is not in the encoder."""
    assert isinstance(method, Method)
    if not name.startswith(_ENCODER):
        return 0
    encoder = method.encoder
    return encoder.last_decay_layer - encoder.decay_layer(name.removeprefix(_ENCODER))
