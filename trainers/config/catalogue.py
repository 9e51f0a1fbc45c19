"""Methods a recipe may name: this package's, and those of other distributions."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Union, get_args

from pydantic import Field

from mimray.trainers.config.ae import AEConfig
from mimray.trainers.config.beit import BEiTConfig
from mimray.trainers.config.capi import CAPIConfig
from mimray.trainers.config.distill import DistillConfig
from mimray.trainers.config.dvae import DVAEConfig
from mimray.trainers.config.finetune import FinetuneConfig
from mimray.trainers.config.ibot import IBOTConfig
from mimray.trainers.config.mae import MAEConfig
from mimray.trainers.config.maskfeat import MaskFeatConfig
from mimray.trainers.config.method import MethodConfig
from mimray.trainers.config.simmim import SimMIMConfig
from mimray.trainers.config.vae import VAEConfig

BUILT_IN: tuple[type[MethodConfig], ...] = (
    MAEConfig,
    SimMIMConfig,
    MaskFeatConfig,
    BEiTConfig,
    DistillConfig,
    CAPIConfig,
    IBOTConfig,
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
