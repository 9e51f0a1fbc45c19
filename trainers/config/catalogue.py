"""Methods a recipe may name: this package's, and those of other distributions."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Union, get_args

from pydantic import Field

from mimray.trainers.config.distill import DistillConfig
from mimray.trainers.config.method import (
    AEConfig,
    BEiTConfig,
    DVAEConfig,
    FinetuneConfig,
    MAEConfig,
    MaskFeatConfig,
    MethodConfig,
    SimMIMConfig,
    VAEConfig,
)

BUILT_IN: tuple[type[MethodConfig], ...] = (
    MAEConfig,
    SimMIMConfig,
    MaskFeatConfig,
    BEiTConfig,
    DistillConfig,
    AEConfig,
    VAEConfig,
    DVAEConfig,
    FinetuneConfig,
)
"""The methods of this package."""

ENTRY_POINTS = "mimray.methods"
"""Entry-point group under which other distributions register their methods' config classes."""

# Looked up at import, because the recipe's model is built from them.
METHODS: dict[str, type[MethodConfig]] = {
    get_args(config.model_fields["name"].annotation)[0]: config
    for config in (*BUILT_IN, *(point.load() for point in entry_points(group=ENTRY_POINTS)))
}

if TYPE_CHECKING:
    AnyMethod = MethodConfig
else:
    AnyMethod = Annotated[Union[tuple(METHODS.values())], Field(discriminator="name")]  # noqa: UP007
