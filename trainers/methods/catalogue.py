"""The methods by name; a method's module is imported when a recipe names it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from mimray.trainers.config.catalogue import METHODS

if TYPE_CHECKING:
    from mimray.trainers.config.run import Recipe
    from mimray.trainers.data.views import Inputs
    from mimray.trainers.methods.base import Method


def method_class(name: str) -> type[Method]:
    """The class of a method.

    Args:
        name: the method's name in a checked recipe.
    """
    module, _, attribute = METHODS[name].implementation.partition(":")
    found: type[Method] = getattr(importlib.import_module(module), attribute)
    return found


def build_method(recipe: Recipe) -> Method:
    """Build a freshly initialised method; a seed of torch makes it repeatable."""
    return method_class(recipe.method.name)(recipe)


def inputs_of(recipe: Recipe) -> Inputs:
    """The inputs of a picture that a recipe's method declares."""
    return method_class(recipe.method.name).views(recipe)
