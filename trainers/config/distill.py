"""Configuration of `distill`: features of a frozen teacher as targets."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from mimray.trainers.config.composition import check_ratio
from mimray.trainers.config.method import BlockMasking, Size, num_patches_of
from mimray.trainers.config.model import ConvConfig, DalleConfig, EncoderConfig, ViTConfig


class DistillConfig(BlockMasking):
    """Feature targets: a frozen teacher's tokens, predicted at hidden places or at all of them.

    With `mask_ratio` 0 nothing is hidden: plain distillation of every token.
    """

    implementation = "mimray.trainers.methods.distill:Distill"
    places = ("teacher",)

    name: Literal["distill"]
    teacher: str = Field(
        default="", description="bundle or run with the teacher; path or URI every node sees"
    )
    teacher_sha256: str = Field(
        default="", description="digest of the teacher's weights; filled in by the plan"
    )
    teacher_image_size: tuple[PositiveInt, PositiveInt] | None = Field(
        default=None,
        description="height and width the teacher sees; null: as its bundle says, filled in by "
        "the plan",
    )
    teacher_width: PositiveInt = Field(
        default=768, description="width of the teacher's tokens; filled in by the plan"
    )
    last_layers: PositiveInt = Field(
        default=1, description="layers of the teacher averaged in a target, counted from its last"
    )
    layers: tuple[int, ...] = Field(
        default=(),
        description="layers averaged in place of last_layers, from 0; negative from the end",
    )
    loss: Literal["cosine", "smooth_l1"] = Field(
        default="cosine", description="between predictions and layer-normalised targets"
    )
    smooth_l1_beta: PositiveFloat = Field(
        default=1.0, description="smooth_l1: difference below which it is quadratic"
    )
    masking: Literal["block", "random"] = Field(default="block", description="shape of the mask")
    mask_ratio: float = Field(
        default=0.4,
        ge=0,
        lt=1,
        description="share of patches hidden; in blocks at most int(N x mask_ratio); 0: none, and "
        "every token is predicted",
    )
    predict: Literal["hidden", "visible", "all"] = Field(
        default="hidden", description="places whose tokens are predicted"
    )
    pooled_weight: float = Field(
        default=0.0, ge=0, description="weight of the teacher's pooled feature in the loss; 0: none"
    )
    pooling: Literal["mean", "cls"] = Field(
        default="mean",
        description="what predicts the pooled feature, and the bundle's pooling: the mean of the "
        "patches, or the class token",
    )

    @field_validator("teacher_image_size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _check_keys(self) -> DistillConfig:
        if self.layers and self.last_layers > 1:
            raise ValueError(
                f"method.layers {list(self.layers)} and method.last_layers {self.last_layers} "
                "both choose layers of the teacher; set one of them"
            )
        if self.loss == "cosine" and self.smooth_l1_beta != 1.0:
            raise ValueError("method.smooth_l1_beta: of no use to loss cosine")
        if self.pooling == "cls" and not self.pooled_weight:
            raise ValueError(
                "method.pooling cls with method.pooled_weight 0 leaves the class token untrained; "
                "set method.pooled_weight, e.g. 1"
            )
        return self

    def check_encoder(self, encoder: EncoderConfig) -> None:
        """Require tokens to hide where any are hidden, and a class token where it predicts."""
        if isinstance(encoder, DalleConfig):
            raise ValueError(
                "encoder dalle makes codes of pictures; method distill wants a vit, swin or conv"
            )
        if self.mask_ratio and isinstance(encoder, ConvConfig):
            raise ValueError(
                f"method distill with method.mask_ratio {self.mask_ratio} hides tokens, which "
                "encoder conv does not have; take method.mask_ratio 0, or a vit or swin"
            )
        if self.pooling == "cls" and not (isinstance(encoder, ViTConfig) and encoder.class_token):
            raise ValueError(
                f"encoder {encoder.name} has no class token; method.pooling mean goes with it"
            )

    def check(self, encoder: EncoderConfig, image_size: Size) -> None:
        """Require patches both hidden and visible, and a least block that may be hidden."""
        if not self.mask_ratio:
            return
        num_patches = num_patches_of(encoder, image_size)
        check_ratio(self.mask_ratio, num_patches)
        if self.masking == "block":
            self.check_block(num_patches)

    @property
    def pooled_by(self) -> Literal["mean", "cls"]:
        """The pooling that predicts the pooled feature."""
        return self.pooling

    def chosen_layers(self, depth: int) -> tuple[int, ...]:
        """The teacher's layers that are averaged, counted from 0, in ascending order.

        Args:
            depth: number of the teacher's layers.

        Raises:
            ValueError: the teacher has no such layer, or a layer is named twice.
        """
        if not self.layers:
            if self.last_layers > depth:
                raise ValueError(f"method.last_layers {self.last_layers} is more than that")
            return tuple(range(depth - self.last_layers, depth))
        chosen = sorted(layer + depth if layer < 0 else layer for layer in self.layers)
        if chosen[0] < 0 or chosen[-1] >= depth:
            raise ValueError(f"method.layers {list(self.layers)} must lie in {-depth}..{depth - 1}")
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"method.layers {list(self.layers)} names a layer twice")
        return tuple(chosen)
