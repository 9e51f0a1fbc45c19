"""Encoders a recipe may name. One class an architecture family, told apart by `name`."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from pydantic import Field, PositiveInt, model_validator

from trainers.config.base import Config


class _Shape(NamedTuple):
    width: int
    depth: int
    num_heads: int
    patch_size: int


# Dosovitskiy et al. 2021, Table 1; Tiny from Touvron et al. 2021 (DeiT), Table 1.
VIT_SHAPES: dict[str, _Shape] = {
    "vit_tiny": _Shape(192, 12, 3, 16),
    "vit_small": _Shape(384, 12, 6, 16),
    "vit_base": _Shape(768, 12, 12, 16),
    "vit_large": _Shape(1024, 24, 16, 16),
    "vit_huge": _Shape(1280, 32, 16, 14),
}


class ViTConfig(Config):
    """A plain vision transformer with a class token and fixed 2-D sin-cos positions.

    `name` picks a published shape, of which any part may be overridden; `vit` leaves all of
    width, depth and num_heads to the recipe.
    """

    name: Literal["vit", "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"]
    width: PositiveInt = Field(description="token width D")
    depth: PositiveInt = Field(description="number of transformer blocks")
    num_heads: PositiveInt = Field(description="attention heads; must divide width")
    patch_size: PositiveInt = Field(description="side of a square patch, pixels")
    mlp_ratio: float = Field(default=4.0, gt=0, description="hidden width of the MLP over width")
    drop_path: float = Field(default=0.0, ge=0, lt=1, description="stochastic depth, last block")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_name(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("name") in VIT_SHAPES:
            return {**VIT_SHAPES[data["name"]]._asdict(), **data}
        if isinstance(data, dict) and data.get("name") == "vit":
            return {"patch_size": 16, **data}
        return data

    @model_validator(mode="after")
    def _check_shape(self) -> ViTConfig:
        if self.width % self.num_heads:
            raise ValueError(
                f"encoder.width {self.width} is not a multiple of num_heads {self.num_heads}"
            )
        if self.width % 4:
            raise ValueError(
                f"encoder.width {self.width} is not a multiple of 4, "
                "which 2-D sin-cos positions need"
            )
        return self


# Grows into a union told apart by `name` when a second family arrives.
EncoderConfig = ViTConfig
