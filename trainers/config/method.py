"""Objectives a recipe may name. One class a method, told apart by `name`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from trainers.config.base import Config


class MAEConfig(Config):
    """Masked autoencoder (He et al. 2022): visible tokens only, light decoder, pixel targets."""

    name: Literal["mae"]
    mask_ratio: float = Field(default=0.75, gt=0, lt=1, description="share of patches hidden")
    decoder_width: PositiveInt = Field(default=512, description="decoder token width")
    decoder_depth: PositiveInt = Field(default=8, description="decoder blocks")
    decoder_num_heads: PositiveInt = Field(default=16, description="decoder attention heads")
    norm_pix_loss: bool = Field(
        default=False, description="targets normalised by each patch's own mean and variance"
    )

    @model_validator(mode="after")
    def _check_decoder(self) -> MAEConfig:
        if self.decoder_width % self.decoder_num_heads or self.decoder_width % 4:
            raise ValueError(
                f"method.decoder_width {self.decoder_width} must be a multiple of 4 and of "
                f"method.decoder_num_heads {self.decoder_num_heads}"
            )
        return self


# Grows into a union told apart by `name` when a second method arrives.
MethodConfig = MAEConfig
