"""AdamW, its parameter groups, and their learning rates and weight decays by step."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from mimray.trainers.config.optim import OptimConfig, ParameterGroup
from mimray.trainers.config.run import Plan
from mimray.trainers.engine.schedule import learning_rate
from mimray.trainers.errors import ConfigError
from mimray.trainers.methods.base import Method
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.methods.lora import adapt

_ENCODER = "encoder."
_REST = ParameterGroup(parameters=("*",))


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Parameter groups, one per layer, weight decay and entry of the config's `groups`.

    Weights decay; biases and norms (anything of one dimension) do not, nor do parameters that
    `no_decay` names. Class and mask tokens have three dimensions and decay, as in the official MAE
    code, unless a recipe names them. With `layer_decay` the learning rate of a layer of the encoder
    is that of the next one times it; parameters behind the encoder have the full rate. With
    `unfreeze_every_steps` the layers of the encoder begin to train one after the other.

    Args:
        module: a method; parameters that are not trained are left out.
        config: the recipe's `optim` section.

    Returns:
        Groups for torch, with `lr_scale`, a factor of the learning rate; and, if the config has
        groups, a schedule of the decay or frozen layers, `of`, the index of the config's group (-1
        for none), and `spared`, True if the group does not decay; and with frozen layers
        `frozen_steps`, the number of updates after which the group begins to train.

    Raises:
        ConfigError: a group of the config names no parameter that is trained.

    Source: He et al. 2022, A.1; the grouping is timm's. Layer-wise decay by Clark et al. 2020
        (ELECTRA), sec. 3.1, as in Bao et al. 2022 (BEiT), A.
    """
    groups: dict[tuple[int, bool, int], dict[str, Any]] = {}
    thaws = config.unfreeze_every_steps is not None
    moves = bool(config.groups) or not config.weight_decay.constant or thaws
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        # ZeRO-3 leaves empty shards in place of parameters; ds_shape is the real one.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        spared = len(shape) <= 1 or name.rsplit(".", 1)[-1] in config.no_decay
        by_layer = config.layer_decay is not None or thaws
        height = _layers_above(module, name) if by_layer else 0
        of = _group_of(name, config)
        own = _own(config, of)
        group = groups.setdefault(
            (-height, spared, of),
            {
                "params": [],
                "weight_decay": 0.0 if spared else (own.weight_decay or config.weight_decay).start,
                "lr_scale": (config.layer_decay or 1.0) ** height * own.lr_scale,
                **({"of": of, "spared": spared} if moves else {}),
                **({"frozen_steps": _frozen_steps(module, name, config)} if thaws else {}),
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


def check_trained(plan: Plan) -> None:
    """Refuse adapters, groups and frozen layers that the parameters of a plan's method lack.

    The method is built on shapes alone, and only where the recipe has such keys.

    Args:
        plan: the run's plan.

    Raises:
        ConfigError: a pattern names nothing, or layers would not begin to train before the end.
    """
    optim = plan.recipe.optim
    if plan.recipe.lora is None and not optim.groups and optim.unfreeze_every_steps is None:
        return
    with torch.device("meta"):
        method = build_method(plan.recipe)
    adapt(method)
    groups = parameter_groups(method, optim)
    last = max(group.get("frozen_steps", 0) for group in groups)
    if optim.unfreeze_every_steps is not None and last >= plan.steps:
        layers = max(
            _layers_above(method, n) for n, p in method.named_parameters() if p.requires_grad
        )
        fits = (plan.steps - 1) // max(1, layers)
        raise ConfigError(
            f"optim.unfreeze_every_steps {optim.unfreeze_every_steps} begins to train the first of "
            f"{layers} layers after {last} steps, and the run has {plan.steps}",
            hint=f"--set optim.unfreeze_every_steps={fits}, or less"
            if fits
            else f"a run of more than {layers} steps",
        )


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; `set_hyperparameters` sets rates and decays at each step."""
    return torch.optim.AdamW(
        parameter_groups(module, config),
        lr=config.base_lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def set_hyperparameters(optimizer: Any, plan: Plan, step: int) -> None:
    """Set each group's learning rate and weight decay for one update.

    Args:
        optimizer: a result of `build_optimizer`, or DeepSpeed's optimiser around one.
        plan: the run's plan, with its schedules and length.
        step: updates made before this one.
    """
    rate, optim = learning_rate(plan, step), plan.recipe.optim
    for group in optimizer.param_groups:
        # Groups of checkpoints older than layer-wise decay have no scale.
        group["lr"] = rate * group.get("lr_scale", 1.0)
        if "of" not in group:
            continue
        own = _own(optim, group["of"])
        if step < group.get("frozen_steps", own.frozen_steps):
            group["lr"] = 0.0  # weight decay would move them without gradients
        if not group["spared"]:
            decay = own.weight_decay or optim.weight_decay
            group["weight_decay"] = decay.at(step, plan.length_at(step))
        if 0 < group.get("frozen_steps", 0) <= step:
            factor = _as_if_new(step + 1, step + 1 - group["frozen_steps"], optim.betas)
            group["lr"] *= factor
            group["weight_decay"] /= factor  # which the rate multiplies


def _as_if_new(updates: int, own: int, betas: tuple[float, float]) -> float:
    """The factor of Adam's rate that makes a late parameter's updates those of its first ones.

    Moments begin at zero, and are divided by 1 - beta^t to make up for it. The optimiser counts in
    t the updates before the parameter had gradients, too, and with betas of .9 and .999 its first
    steps would be three to six times too long.

    Args:
        updates: updates of the optimiser, this one included.
        own: those of them in which the parameter had gradients.
        betas: the decays of both moments.

    Source: Kingma & Ba 2015, algorithm 1.
    """
    mean, square = ((1 - beta**own) / (1 - beta**updates) for beta in betas)
    return math.sqrt(square) / mean


class FrozenGradients:
    """Zeroes the gradients of parameters that are frozen at the start of a run.

    A hook zeroes each as it is computed, before ZeRO moves it, so it counts in no norm.

    Args:
        module: a method; its parameters get hooks.
        config: the recipe's `optim` section: `frozen_steps` of its groups and frozen layers.

    Attributes:
        step: updates made so far; the loop sets it before each update.

    Source: Caron et al. 2021 (DINO), the official code's `cancel_gradients_last_layer`.
    """

    def __init__(self, module: nn.Module, config: OptimConfig) -> None:
        self.step = 0
        for name, parameter in module.named_parameters():
            until = _frozen_steps(module, name, config)
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


def _frozen_steps(module: nn.Module, name: str, config: OptimConfig) -> int:
    """Updates before a parameter begins to train, the later of its group's and its layer's."""
    of_group = _own(config, _group_of(name, config)).frozen_steps
    if config.unfreeze_every_steps is None:
        return of_group
    return max(of_group, config.unfreeze_every_steps * _layers_above(module, name))


def _layers_above(method: nn.Module, name: str) -> int:
    """Layers between a parameter and the head; 0 for parameters outside the encoder."""
    assert isinstance(method, Method)
    if not name.startswith(_ENCODER):
        return 0
    encoder = method.encoder
    return encoder.last_decay_layer - encoder.decay_layer(name.removeprefix(_ENCODER))
