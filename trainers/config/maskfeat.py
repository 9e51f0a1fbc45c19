"""Configuration of MaskFeat."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from mimray.trainers.config.composition import check_drops_hidden, check_masking, check_ratio
from mimray.trainers.config.method import BlockMasking, Size, TransformerDecoder, num_patches_of
from mimray.trainers.config.model import EncoderConfig


class MaskFeatConfig(BlockMasking, TransformerDecoder):
    """MaskFeat (Wei et al. 2022): histograms of oriented gradients of hidden patches.

    With `decoder_depth` 0 (the paper) hidden patches go through the encoder as mask tokens and
    a linear head predicts; with more the encoder sees visible patches only, as in MAE.
    """

    implementation = "mimray.trainers.methods.maskfeat:MaskFeat"

    name: Literal["maskfeat"]
    masking: Literal["block", "random"] = Field(default="block", description="shape of the mask")
    min_block_patches: PositiveInt = Field(default=15, description="patches of the least block")
    decoder_depth: NonNegativeInt = Field(default=0, description="decoder blocks; 0: linear head")
    hog_bins: PositiveInt = Field(default=9, description="unsigned orientations over 180 degrees")
    hog_cell_px: PositiveInt = Field(default=8, description="side of a histogram's cell, pixels")

    @model_validator(mode="after")
    def _check_masking(self) -> MaskFeatConfig:
        if self.decoder_depth and self.masking == "block":
            raise ValueError(
                "method.masking block hides another number of patches in each picture, which an "
                "encoder of visible patches cannot batch; with method.decoder_depth take random"
            )
        return self

    def check_encoder(self, encoder: EncoderConfig) -> None:
        """Require tokens to hide, and cells that divide one; with a decoder, as for MAE."""
        check_masking(self.name, encoder)
        if self.drops_hidden:
            check_drops_hidden(self.name, encoder)
        if encoder.stride % self.hog_cell_px:
            raise ValueError(
                f"method.hog_cell_px {self.hog_cell_px} does not divide the encoder's stride "
                f"{encoder.stride}"
            )

    def check(self, encoder: EncoderConfig, image_size: Size) -> None:
        """Require patches both hidden and visible, and a least block that may be hidden."""
        num_patches = num_patches_of(encoder, image_size)
        check_ratio(self.mask_ratio, num_patches)
        if self.masking == "block":
            self.check_block(num_patches)

    @property
    def drops_hidden(self) -> bool:
        """True if there is a decoder."""
        return self.decoder_depth > 0
