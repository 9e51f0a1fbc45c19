"""Options of an extraction."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mimray.trainers.config.base import Config

View = Literal["whole", "center_crop"]
Pooled = Literal["mean", "cls"]
PositiveFraction = Annotated[PositiveFloat, Field(le=1)]


class ExtractSpec(Config):
    """Features and views to keep of each picture, and their storage."""

    pooled: tuple[Pooled, ...] = Field(
        default=(), description="mean of the patch tokens, class token; after the final norm"
    )
    layers: tuple[int, ...] = Field(
        default=(), description="feature maps after these layers; negative from the end"
    )
    tokens: bool = Field(default=False, description="the patch tokens after the final norm")
    norm: bool = Field(default=True, description="apply the final norm to maps of its width")
    dtype: Literal["float16", "float32"] = Field(default="float32", description="as stored")
    limit: PositiveInt | None = Field(
        default=None, description="so many pictures, evenly spread; all by default"
    )
    image_size: tuple[PositiveInt, PositiveInt] | None = Field(
        default=None, description="height and width of the input, pixels; the card's by default"
    )
    view: View = Field(
        default="whole",
        description="whole: resized to the input, as served; center_crop: its aspect kept, the "
        "shorter side at the input / 0.875, and the centre cut, as in the papers",
    )
    num_views: NonNegativeInt = Field(
        default=0, description="random resized crops and flips a picture; 0: the whole, resized"
    )
    crop_scale: tuple[PositiveFraction, PositiveFraction] = Field(
        default=(0.08, 1.0), description="bounds of a crop's area over the picture's"
    )
    seed: NonNegativeInt = Field(default=0, description="seed of the crops")
    skip_invalid: bool = Field(
        default=False, description="leave out pictures that cannot be decoded, and list them"
    )
    part_pictures: PositiveInt = Field(
        default=512, description="most pictures in a file; fewer where features are large"
    )

    @model_validator(mode="after")
    def _check(self) -> ExtractSpec:
        if not (self.pooled or self.layers or self.tokens):
            raise ValueError("nothing to extract: name pooled, layers or tokens")
        if self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError(f"crop_scale {self.crop_scale} must rise")
        return self
