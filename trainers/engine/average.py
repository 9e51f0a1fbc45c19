"""The average of a run's weights that `optim.ema` asks for, kept beside those of any method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from mimray.trainers.config.run import Recipe
from mimray.trainers.errors import ConfigError
from mimray.trainers.methods.base import Method
from mimray.trainers.methods.catalogue import method_class
from mimray.trainers.models.averages import MovingAverages

Weights = Literal["average", "raw"]

_PREFIX = "ema."


def check_average(recipe: Recipe) -> None:
    """Refuse an average of a method whose result is one already.

    Raises:
        ConfigError: that is so.
    """
    if recipe.optim.ema is None:
        return
    result = method_class(recipe.method.name).result
    if result != "encoder":
        raise ConfigError(
            f"optim.ema averages the trained encoder, and method.{recipe.method.name} exports an "
            f"average of it already, {result}",
            hint="leave optim.ema out",
        )


def with_average(method: Method) -> Method:
    """Add the average that the recipe asks for, beginning with the weights as they are.

    It follows every module and parameter of the method in which something is trained. The method's
    own averages are none of these.

    Args:
        method: the method, with its initial weights.

    Returns:
        The same method, with `ema` where the recipe has `optim.ema`.
    """
    momentum = method.recipe.optim.ema
    if momentum is not None:
        trained: dict[str, nn.Module | nn.Parameter] = {
            name: module
            for name, module in method.named_children()
            if any(parameter.requires_grad for parameter in module.parameters())
        }
        trained |= {n: p for n, p in method.named_parameters(recurse=False) if p.requires_grad}
        method.ema = MovingAverages(trained, momentum)
    return method


def chosen_weights(state: Mapping[str, Tensor], weights: Weights) -> dict[str, Tensor]:
    """The weights of a method by itself, without the average beside it.

    Args:
        state: the state of a method from `with_average`.
        weights: `average` takes averages where there are any, `raw` the weights as trained.

    Returns:
        The state of the method as `build_method` makes it.
    """
    method = {name: value for name, value in state.items() if not name.startswith(_PREFIX)}
    if weights == "raw":
        return method
    return {name: state.get(_PREFIX + name, value) for name, value in method.items()}


def has_average(state: Mapping[str, Tensor]) -> bool:
    """True if a state is that of a method with an average beside it."""
    return any(name.startswith(_PREFIX) for name in state)
