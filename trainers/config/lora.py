"""The `lora` section of a recipe: an encoder adapted by matrices of low rank."""

from __future__ import annotations

from pydantic import Field, PositiveFloat, PositiveInt

from mimray.trainers.config.base import Config


class LoraConfig(Config):
    """Low-rank adapters of the encoder's linear layers, whose own weights stay as they begin."""

    rank: PositiveInt = Field(default=8, description="rank of the change of each weight")
    alpha: PositiveFloat = Field(default=16.0, description="the change is scaled by alpha / rank")
    targets: tuple[str, ...] = Field(
        default=("attn.qkv", "attn.proj"),
        min_length=1,
        description="patterns of linear layers of the encoder, or of the ends of their names, "
        "e.g. mlp.*, blocks.11.attn.qkv; * is anything",
    )
    trained: tuple[str, ...] = Field(
        default=("norm.*",),
        description="patterns of parameters of the encoder that are trained themselves, by their "
        "whole names, e.g. *.norm1.*, pos_embed; by default those of the last norm",
    )

    @property
    def scale(self) -> float:
        """The factor of the product of the two matrices."""
        return self.alpha / self.rank
