"""Low-rank adaptation (LoRA) of a method's encoder, and its merging into plain weights.

Source: Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models"; the initialisation is
that of github.com/microsoft/LoRA, `loralib/layers.py`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mimray.trainers.config.lora import LoraConfig
from mimray.trainers.config.run import Recipe
from mimray.trainers.errors import ConfigError
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.models.averages import MovingAverages

if TYPE_CHECKING:
    from mimray.trainers.methods.base import Method

DOWN, UP = "lora_down", "lora_up"
_RESIDUALS = "averages.residuals."


class LoraLinear(nn.Linear):
    """The part of an adapted layer that adds scale x up(down(x)) to what its own class computes.

    `up` is zero at first, so that the layer begins as it was, bit for bit. Weight and bias keep
    their names.
    """

    scale: float
    lora_down: nn.Parameter
    lora_up: nn.Parameter

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        """Apply the layer and its change."""
        plain: Tensor = super().forward(x)
        return plain + F.linear(F.linear(x, self.lora_down) * self.scale, self.lora_up)


@functools.cache
def _adapted(kind: type[nn.Linear]) -> type[nn.Linear]:
    """The class of an adapted layer, whose own forward pass may be more than a product."""
    return type(f"Lora{kind.__name__}", (LoraLinear, kind), {})


def _add_adapter(linear: Any, config: LoraConfig, generator: torch.Generator) -> None:
    weight = linear.weight
    linear.__class__ = _adapted(type(linear))  # type: ignore[arg-type]  # classes are hashable
    linear.scale = config.scale
    linear.lora_down = nn.Parameter(weight.new_empty(config.rank, linear.in_features))
    linear.lora_up = nn.Parameter(weight.new_zeros(linear.out_features, config.rank))
    if not weight.is_meta:
        nn.init.kaiming_uniform_(linear.lora_down, a=math.sqrt(5), generator=generator)


def adapt(method: Method) -> None:
    """Fix a method's encoder and give it the adapters of its recipe, if that has any.

    To be called once the encoder has the weights to begin with. Moving averages start anew from
    what they follow, with adapters of their own. The rest of the method is trained as before.

    Args:
        method: the method; its state keeps all names, and gets those of the adapters.

    Raises:
        ConfigError: the encoder has no such layers or parameters, or a layer is no larger than the
            rank.
    """
    config = method.recipe.lora
    if config is None:
        return
    encoder, name = method.encoder, method.recipe.encoder.name
    trainable = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
    linear = {n: m for n, m in encoder.named_modules() if isinstance(m, nn.Linear)}
    if not linear:
        raise ConfigError(
            f"lora adapts linear layers, of which encoder {name} has none", hint="--set lora=null"
        )
    ends = [*config.targets, *(f"*.{pattern}" for pattern in config.targets)]
    targets = _matching(linear, ends)
    for pattern in config.targets:
        if not _matching(linear, (pattern, f"*.{pattern}")):
            raise _unknown("targets", pattern, f"linear layer of encoder {name}", linear)
    for pattern in config.trained:
        if not _matching(trainable, (pattern,)):
            raise _unknown("trained", pattern, f"trained parameter of encoder {name}", trainable)
    generator = torch.Generator().manual_seed(method.recipe.seed)
    encoder.requires_grad_(False)
    for layer in targets:
        found = linear[layer]
        least = min(found.in_features, found.out_features)
        if config.rank >= least:
            raise ConfigError(
                f"lora.rank {config.rank} is not below the full rank of {layer}, which maps "
                f"{found.in_features} numbers to {found.out_features}",
                hint=f"--set lora.rank={min(8, max(1, least // 4))}, or other lora.targets",
            )
        _add_adapter(found, config, generator)
    for parameter in _matching(trainable, config.trained):
        trainable[parameter].requires_grad_(True)
    if method.averages is not None:
        followed = {n: getattr(method, n) for n in method.averages.names}
        method.averages = MovingAverages(followed, method.averages.momentum)


def merged(state: Mapping[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    """The state of a method without adapters that computes the same.

    Args:
        state: whole fp32 weights of a method that `adapt` was given, or of some of its modules.
        recipe: its recipe.
    """
    config = recipe.lora
    if config is None:
        return dict(state)
    with torch.device("meta"):
        plain = build_method(recipe).state_dict()
    # Averages of fixed weights have no residuals, which are rounding errors.
    averaged = any(n.startswith(_RESIDUALS) for n in state)
    residuals = {
        n: torch.zeros(like.shape)
        for n, like in plain.items()
        if averaged and n.startswith(_RESIDUALS) and n not in state
    }
    kept = (n for n in state if not n.endswith((DOWN, UP)))
    return {name: _merge(name, state, config) for name in kept} | residuals


def describe(state: Mapping[str, Tensor], recipe: Recipe) -> dict[str, object]:
    """Adapters as a bundle's card notes them.

    Args:
        state: whole weights of a method that `adapt` was given.
        recipe: its recipe, which has adapters.
    """
    config = recipe.lora
    assert config is not None
    ups = [n for n in state if n.startswith("encoder.") and n.endswith(f".{UP}")]
    return {
        "rank": config.rank,
        "alpha": config.alpha,
        "layers": [_layer(n).removeprefix("encoder.") for n in ups],
    }


def _merge(name: str, state: Mapping[str, Tensor], config: LoraConfig) -> Tensor:
    up = state.get(f"{_layer(name)}.{UP}")
    if up is None or not name.endswith(".weight"):
        return state[name]
    down = state[f"{_layer(name)}.{DOWN}"]
    # In double precision, so that the sum is rounded once.
    change = config.scale * (up.double() @ down.double())
    return (state[name].double() + change).to(state[name].dtype)


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _matching(names: Iterable[str], patterns: Collection[str]) -> list[str]:
    return [n for n in names if any(fnmatchcase(n, pattern) for pattern in patterns)]


def _unknown(key: str, pattern: str, noun: str, known: Iterable[str]) -> ConfigError:
    """The error of a pattern that matches nothing; lists the names of all blocks as one."""
    kinds = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in known)
    return ConfigError(f"lora.{key}: {pattern} is no {noun}", hint=f"there are {', '.join(kinds)}")
