"""From the name of a method to the method; its file is read when a recipe names it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from mimray.trainers.config.method import METHODS

if TYPE_CHECKING:
    from mimray.trainers.config.run import Recipe
    from mimray.trainers.data.views import Inputs
    from mimray.trainers.methods.base import Method


def method_class(name: str) -> type[Method]:
    """The class of the method a recipe names; configs have checked the name already."""
    module, _, attribute = METHODS[name].implementation.partition(":")
    found: type[Method] = getattr(importlib.import_module(module), attribute)
    return found


def build_method(recipe: Recipe) -> Method:
    """A freshly initialised method; seed torch before for a repeatable one."""
    return method_class(recipe.method.name)(recipe)


def inputs_of(recipe: Recipe) -> Inputs:
    """The inputs of a picture that a recipe's method declares."""
    return method_class(recipe.method.name).views(recipe)
