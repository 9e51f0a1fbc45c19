"""Configuration of fine-tuning."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeInt, model_validator

from mimray.trainers.config.method import MethodConfig
from mimray.trainers.config.model import DalleConfig, EncoderConfig, ViTConfig


class FinetuneConfig(MethodConfig):
    """Fine-tuning: classification with the encoder trained end to end (He et al. 2022, A.1)."""

    implementation = "mimray.trainers.methods.finetune:Finetune"
    learns_classes = True
    init_key = "bundle"
    begins_with_rest = False
    trains_positions = True

    name: Literal["finetune"]
    bundle: str = Field(
        default="",
        description="bundle or run whose encoder to begin from, the same as --init; path or URI "
        "every node sees; empty: a fresh encoder",
    )
    bundle_sha256: str = Field(
        default="", description="digest of the encoder's weights; filled in by the plan"
    )
    num_classes: NonNegativeInt = Field(
        default=0, description="0: as many as the data has; filled in by the plan"
    )
    class_names: tuple[str, ...] = Field(
        default=(), description="by class, where the data names them; filled in by the plan"
    )
    pooling: Literal["mean", "cls"] = Field(
        default="mean", description="what the head sees: the mean of the patches, or class token"
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="share of a target spread evenly over all classes"
    )
    mixup: float = Field(
        default=0.0, ge=0, description="alpha of mixup: the share is of Beta(alpha, alpha); 0 never"
    )
    cutmix: float = Field(default=0.0, ge=0, description="alpha of cutmix; 0 never")
    mixup_prob: float = Field(
        default=1.0, ge=0, le=1, description="probability that a picture is mixed"
    )
    mixup_switch_prob: float = Field(
        default=0.5, ge=0, le=1, description="probability of cutmix where both are on"
    )

    @model_validator(mode="before")
    @classmethod
    def _init_is_bundle(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not values.get("init"):
            return values
        if values.get("bundle"):
            raise ValueError("method.init and method.bundle of finetune are the same; give one")
        return {**values, "bundle": values["init"], "init": ""}

    def check_encoder(self, encoder: EncoderConfig) -> None:
        """Require an encoder with the pooling that the head uses."""
        if isinstance(encoder, DalleConfig):
            raise ValueError("encoder dalle makes codes of pictures; it is not for fine-tuning")
        if self.pooling == "cls" and not (isinstance(encoder, ViTConfig) and encoder.class_token):
            raise ValueError(
                f"encoder {encoder.name} has no class token; method.pooling mean goes with it"
            )

    @property
    def pairs(self) -> bool:
        """True if pictures are mixed."""
        return bool((self.mixup or self.cutmix) and self.mixup_prob)

    @property
    def pooled_by(self) -> Literal["mean", "cls"]:
        """The pooling that the head was trained on."""
        return self.pooling
