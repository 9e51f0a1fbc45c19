"""Configuration of SimMIM."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from mimray.trainers.config.composition import check_masking, check_units
from mimray.trainers.config.method import MethodConfig, Size
from mimray.trainers.config.model import EncoderConfig


class SimMIMConfig(MethodConfig):
    """SimMIM (Xie et al. 2022): mask tokens through the encoder, one linear head, pixels."""

    implementation = "mimray.trainers.methods.simmim:SimMIM"

    name: Literal["simmim"]
    mask_ratio: float = Field(default=0.6, gt=0, lt=1, description="share of mask units hidden")
    mask_unit_px: PositiveInt | None = Field(
        default=32,
        description="side of a mask unit, a multiple of the encoder's stride; null: one token",
    )
    loss: Literal["l1", "l2"] = Field(default="l1", description="l1 as in the paper")

    def check_encoder(self, encoder: EncoderConfig) -> None:
        """Require an encoder with tokens to hide."""
        check_masking(self.name, encoder)

    def check(self, encoder: EncoderConfig, image_size: Size) -> None:
        """Require mask units that are whole tokens, divide the picture, and leave one visible."""
        check_units(self.mask_ratio, self.mask_unit_px, encoder, image_size)
