"""The `evaluation` section of a recipe: a running probe, a score of the encoder on the way."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from mimray.trainers.config.base import Config


class ProbeConfig(Config):
    """A running probe: the encoder is scored every few updates; what is learnt stays the same."""

    every_steps: NonNegativeInt = Field(
        default=0, description="updates between two scores; also at the end; 0: no scores"
    )
    task: str | None = Field(
        default=None,
        description="knn, rankme or dense-knn; by default knn where `data` are named, else rankme",
    )
    data: str | None = Field(
        default=None, description="pictures to learn from and to score on; those trained on"
    )
    val: str | None = Field(
        default=None,
        description="pictures to score on; by default the validation split of `data`, or some held "
        "out of it, as in `mimray evaluate`",
    )
    label: str | None = Field(default=None, description="column of the labels, as in data.label")
    limit: PositiveInt = Field(
        default=2000, description="most pictures to learn from, and to score on, evenly spread"
    )
    weights: Literal["exported", "trained"] = Field(
        default="exported",
        description="exported: the encoder as the bundle will hold it, which may be an average "
        "(optim.ema, a teacher); trained: the one that gradients move",
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="options of the task, as in `mimray evaluate --set`"
    )

    @model_validator(mode="after")
    def _check(self) -> ProbeConfig:
        if self.model_fields_set and "every_steps" not in self.model_fields_set:
            raise ValueError("evaluation needs 'every_steps', the updates between two scores")
        return self

    @property
    def chosen_task(self) -> str:
        """The task's name."""
        return self.task or ("knn" if self.data or self.val else "rankme")
