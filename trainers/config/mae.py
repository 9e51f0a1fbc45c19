"""Configuration of MAE."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from mimray.trainers.config.composition import check_drops_hidden, check_masking, check_ratio
from mimray.trainers.config.method import Size, TransformerDecoder, num_patches_of
from mimray.trainers.config.model import EncoderConfig


class MAEConfig(TransformerDecoder):
    """Masked autoencoder (He et al. 2022): visible tokens only, light decoder, pixel targets."""

    implementation = "mimray.trainers.methods.mae:MAE"

    name: Literal["mae"]
    mask_ratio: float = Field(default=0.75, gt=0, lt=1, description="share of patches hidden")
    decoder_depth: PositiveInt = Field(default=8, description="decoder blocks")
    norm_pix_loss: bool = Field(
        default=False, description="targets normalised by each patch's own mean and variance"
    )

    def check_encoder(self, encoder: EncoderConfig) -> None:
        """Require an encoder that can leave patches out."""
        check_masking(self.name, encoder)
        check_drops_hidden(self.name, encoder)

    def check(self, encoder: EncoderConfig, image_size: Size) -> None:
        """Require patches both hidden and visible."""
        check_ratio(self.mask_ratio, num_patches_of(encoder, image_size))

    @property
    def drops_hidden(self) -> bool:
        """True: the encoder sees visible patches only."""
        return True
