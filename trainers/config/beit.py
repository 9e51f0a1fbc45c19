"""Configuration of BEiT."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator

from mimray.trainers.config.composition import check_masking, check_ratio
from mimray.trainers.config.method import BlockMasking, Size, num_patches_of
from mimray.trainers.config.model import EncoderConfig


class BEiTConfig(BlockMasking):
    """BEiT (Bao et al. 2022): the tokenizer's codes of hidden patches."""

    implementation = "mimray.trainers.methods.beit:BEiT"
    places = ("tokenizer",)

    name: Literal["beit"]
    # int(196 x 0.385) = 75, the official code's number at 224 pixels.
    mask_ratio: float = Field(
        default=0.385, gt=0, lt=1, description="most of the patches hidden: int(N x mask_ratio)"
    )
    tokenizer: str = Field(
        default="", description="bundle or run of method dvae; path or URI every node sees"
    )
    tokenizer_image_size: tuple[PositiveInt, PositiveInt] = Field(
        default=(112, 112),
        description="height and width the tokenizer sees; gives it the encoder's grid",
    )
    tokenizer_sha256: str = Field(
        default="", description="digest of the tokenizer's weights; filled in by the plan"
    )
    vocab_size: PositiveInt = Field(default=8192, description="codes of the tokenizer")

    @field_validator("tokenizer_image_size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value

    def check_encoder(self, encoder: EncoderConfig) -> None:
        """Require an encoder with tokens to hide."""
        check_masking(self.name, encoder)

    def check(self, encoder: EncoderConfig, image_size: Size) -> None:
        """Require patches both hidden and visible, and a least block that may be hidden."""
        num_patches = num_patches_of(encoder, image_size)
        check_ratio(self.mask_ratio, num_patches)
        self.check_block(num_patches)
