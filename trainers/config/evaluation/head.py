"""Options shared by the heads that are trained on an encoder's feature maps."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from mimray.trainers.config.base import Config, ImageSize


class HeadConfig(Config):
    """The views that a head learns from, and its training."""

    image_size: ImageSize | None = Field(
        default=None,
        description="(height, width) of the encoder's input, pixels; one number for a square; "
        "by default near the pictures' own",
    )
    layers: tuple[int, ...] | None = Field(
        default=None, description="layers whose maps the head takes; the bundle's own by default"
    )
    num_views: PositiveInt = Field(
        default=2,
        description="versions of each training picture: the whole one, its mirror image, then "
        "random crops and their mirror images; a frozen encoder sees each once",
    )
    finetune: bool = Field(default=False, description="train the encoder too")
    encoder_lr_scale: PositiveFloat = Field(
        default=0.1, description="learning rate of a trained encoder over the head's"
    )
    epochs: PositiveInt = 20
    batch_size: PositiveInt = 8
    lr: PositiveFloat = Field(default=1e-3, description="peak learning rate of AdamW")
    weight_decay: float = Field(default=0.05, ge=0)
    warmup_epochs: NonNegativeInt = 1
    clip_grad_norm: PositiveFloat | None = 1.0
