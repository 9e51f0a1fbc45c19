"""Options of the linear probe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mimray.trainers.config.base import Config
from mimray.trainers.config.evaluation.extract import View


class LinearConfig(Config):
    """One linear layer on frozen, pooled features.

    The learning rate or the strength of regularisation is chosen on a part of the training pictures
    that is held out, never on those that are scored.
    """

    solver: Literal["logistic", "ridge", "lars"] = Field(
        default="logistic",
        description="logistic: L-BFGS; ridge: closed form; lars: the probe of the MAE paper",
    )
    pooling: Literal["mean", "cls", "both"] | None = Field(
        default=None,
        description="mean of the patch tokens, class token, or both side by side; "
        "the bundle's own by default",
    )
    view: View = Field(
        default="whole",
        description="whole: pictures resized to the input, as served; center_crop: shorter side to "
        "the input / 0.875 (256 for 224), then its centre, as DINO and MAE score",
    )
    held_out: float = Field(
        default=0.1, gt=0, lt=1, description="share of the training pictures to choose on"
    )
    logistic_c: tuple[PositiveFloat, ...] = Field(
        default=(0.001, 0.01, 0.1, 1.0),
        min_length=1,
        description="inverse strengths of regularisation to choose from, scikit-learn's C",
    )
    ridge_alpha: tuple[PositiveFloat, ...] = Field(
        default=(0.1, 1.0, 10.0, 100.0, 1000.0),
        min_length=1,
        description="strengths of regularisation to choose from",
    )
    base_lrs: tuple[PositiveFloat, ...] = Field(
        default=(0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
        min_length=1,
        description="learning rates of lars per 256 pictures, all trained at once",
    )
    epochs: PositiveInt = Field(default=90, description="length of lars")
    warmup_epochs: NonNegativeInt | None = Field(
        default=None,
        description="warm-up of lars; a ninth of epochs by default, 10 of 90 as in the paper",
    )
    batch_size: PositiveInt = Field(
        default=16384, description="batch of lars; cut to the training set where that is smaller"
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum of lars")
    trust_coefficient: PositiveFloat = Field(default=0.001, description="trust coefficient of lars")
    weight_decay: float = Field(default=0.0, ge=0, description="weight decay of lars")
    num_views: NonNegativeInt = Field(
        default=0,
        description="random crops of each picture that lars cycles through by epoch; as many as "
        "epochs is the paper's augmentation, 0 takes whole pictures",
    )

    @model_validator(mode="after")
    def _check(self) -> LinearConfig:
        if self.num_views and self.solver != "lars":
            raise ValueError(f"num_views {self.num_views} goes with solver=lars")
        if self.warmup_epochs is not None and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs} must be fewer than epochs {self.epochs}"
            )
        return self
