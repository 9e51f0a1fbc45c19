"""The `optim` section of a recipe: length, batch size, learning rate, weight decay."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mimray.trainers.config.base import Config
from mimray.trainers.config.schedule import Schedule, Scheduled

Decay = Annotated[float, Field(ge=0, lt=1)]


class ParameterGroup(Config):
    """Parameters with a learning rate, a weight decay or frozen steps of their own."""

    parameters: tuple[str, ...] = Field(
        min_length=1, description="patterns of names in the method, e.g. head.last.*; * is anything"
    )
    lr_scale: float = Field(default=1.0, ge=0, description="learning rate over that of the rest")
    weight_decay: Scheduled | None = Field(
        default=None, description="decay of the weights among them; that of the rest by default"
    )
    frozen_steps: NonNegativeInt = Field(
        default=0, description="updates at the start during which their gradients are dropped"
    )


class OptimConfig(Config):
    """AdamW with linear warm-up, then a per-step half-cosine or steps.

    Length is given either in epochs or in steps, and so is the warm-up.
    """

    name: Literal["adamw"] = "adamw"
    base_lr: PositiveFloat = Field(
        default=1.5e-4, description="peak learning rate at a global batch of 256"
    )
    batch_size: PositiveInt = Field(
        default=4096, description="global batch: pictures an update, over all workers"
    )
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: Scheduled = Field(
        default=Schedule(start=0.05), description="a number, or a schedule"
    )
    groups: tuple[ParameterGroup, ...] = Field(
        default=(),
        description="parameters trained otherwise; the first that names one counts",
        exclude_if=lambda groups: not groups,  # plans without groups keep their form and digest
    )
    no_decay: tuple[str, ...] = Field(
        default=(),
        description="parameters that do not decay beside biases and norms, by the last part of "
        "their name, e.g. cls_token",
    )
    layer_decay: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="learning rate of each layer of the encoder over that of the next one; what "
        "lies behind the encoder keeps the full rate; off by default",
    )
    unfreeze_every_steps: PositiveInt | None = Field(
        default=None,
        description="updates after which one more layer of the encoder begins to train, the last "
        "one first; what lies behind its layers trains from the start; off by default",
    )
    schedule: Literal["cosine", "multistep"] = Field(
        default="cosine", description="course of the learning rate after the warm-up"
    )
    milestones: tuple[float, ...] = Field(
        default=(), description="multistep: shares of the run at which the rate falls"
    )
    gamma: float = Field(default=0.1, gt=0, lt=1, description="multistep: factor of each fall")
    min_lr: float = Field(default=0.0, ge=0, description="learning rate at the end")
    warmup_lr: float = Field(
        default=0.0, ge=0, description="learning rate at the start, where there is a warm-up"
    )
    epochs: PositiveFloat | None = None
    steps: PositiveInt | None = None
    warmup_epochs: float | None = Field(default=None, ge=0)
    warmup_steps: NonNegativeInt | None = None
    clip_grad_norm: PositiveFloat | None = Field(
        default=None, description="largest global gradient norm; off by default, as in MAE"
    )
    clip_tensor_norm: PositiveFloat | None = Field(
        default=None,
        description="largest gradient norm of each parameter tensor by itself, as in DINO; off by "
        "default; grad_norm in the metrics is then of the clipped gradients",
    )

    ema: Scheduled | None = Field(
        default=None,
        description="momentum of an average of the trained weights, which is exported in their "
        "place: a number, e.g. 0.999, or a schedule; none by default",
        exclude_if=lambda ema: ema is None,  # plans without it keep their form and digest
    )

    @model_validator(mode="after")
    def _check(self) -> OptimConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("optim: give exactly one of 'epochs' and 'steps'")
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            raise ValueError("optim: give only one of 'warmup_epochs' and 'warmup_steps'")
        if self.clip_grad_norm is not None and self.clip_tensor_norm is not None:
            raise ValueError(
                "optim: give only one of 'clip_grad_norm', of all gradients together, and "
                "'clip_tensor_norm', of each parameter's"
            )
        for decay in (self.weight_decay, *(group.weight_decay for group in self.groups)):
            if decay is not None and min(decay.start, decay.end or 0, decay.warmup_start or 0) < 0:
                raise ValueError("optim.weight_decay must not be negative")
        if self.ema is not None:
            ends = [
                v for v in (self.ema.start, self.ema.end, self.ema.warmup_start) if v is not None
            ]
            if not all(0 <= value <= 1 for value in ends) or min(ends) == 1:
                raise ValueError(
                    f"optim.ema {', '.join(f'{value:g}' for value in ends)}: a momentum is at "
                    "least 0 and below 1, which only the end of a schedule may reach"
                )
        if (self.schedule == "multistep") != bool(self.milestones):
            raise ValueError("optim: 'milestones' and schedule 'multistep' go together")
        if any(not 0 < m < 1 for m in self.milestones) or list(self.milestones) != sorted(
            self.milestones
        ):
            raise ValueError(
                f"optim.milestones {self.milestones} must rise and lie between 0 and 1"
            )
        return self
