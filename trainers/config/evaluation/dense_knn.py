"""Options of the nearest-neighbour probe of patches."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from mimray.trainers.config.base import ImageSize
from mimray.trainers.config.evaluation.pixel_labels import PixelLabelsConfig


class DenseKnnConfig(PixelLabelsConfig):
    """Semantic segmentation by the most similar patches of labelled pictures; learns nothing."""

    k: PositiveInt = Field(default=30, description="neighbours of a patch")
    temperature: PositiveFloat = Field(
        default=0.02, description="T of a neighbour's weight, exp(cosine / T)"
    )
    layers: tuple[int, ...] = Field(
        default=(-1,),
        min_length=1,
        description="layers whose maps describe a patch, side by side; negative from the end",
    )
    image_size: ImageSize | None = Field(
        default=None,
        description="(height, width) of the encoder's input, pixels; one number for a square; "
        "by default near the pictures' own",
    )
    patch_labels: Literal["soft", "majority"] = Field(
        default="soft",
        description="soft: the shares of a patch's pixels that each class has; majority: the class "
        "of most of them; void counts in neither",
    )
    min_labelled: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="least share of a patch's pixels that are labelled, and neither void nor "
        "padding; patches with less are not retrieved",
    )
    bank_size: PositiveInt = Field(
        default=500_000,
        description="most patches to retrieve from, as many of each picture, drawn by the seed; "
        "each takes 4 bytes a channel and a class",
    )
    batch_size: PositiveInt = Field(default=8, description="windows encoded at once")
