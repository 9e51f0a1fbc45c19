"""Schedules of values over a run: weight decay, momentum, temperatures."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, model_serializer

from mimray.trainers.config.base import Config


class Schedule(Config):
    """A number as a function of the step: a linear warm-up, then a curve from `start` to `end`.

    A constant schedule is read from a plain number and written as one.
    """

    start: float = Field(description="value after the warm-up")
    end: float | None = Field(
        default=None, description="value at the end; that of start by default"
    )
    shape: Literal["linear", "cosine"] = Field(
        default="cosine", description="shape of the curve from start to end"
    )
    length: PositiveFloat = Field(
        default=1.0,
        description="share of the run at whose end `end` is reached; above 1 the run ends before",
    )
    steps: NonNegativeInt = Field(
        default=0, description="step at which `end` is reached, in place of `length`; 0: by length"
    )
    warmup_start: float | None = Field(default=None, description="value at step 0")
    warmup_steps: NonNegativeInt = Field(default=0, description="steps from warmup_start to start")

    def at(self, step: int, num_steps: int) -> float:
        """The value at one update.

        Args:
            step: updates made before this one.
            num_steps: length of the run, in updates.

        Source: half a cosine as Loshchilov & Hutter 2017, eq. 5, without restarts.
        """
        if step < self.warmup_steps and self.warmup_start is not None:
            share = step / self.warmup_steps
            return self.warmup_start + (self.start - self.warmup_start) * share
        end = self.start if self.end is None else self.end
        begin = self.warmup_steps if self.warmup_start is not None else 0
        last = self.steps or self.length * num_steps
        share = min(1.0, max(0.0, (step - begin) / max(1.0, last - begin)))
        if self.shape == "cosine":
            share = 0.5 * (1 - math.cos(math.pi * share))
        return self.start + (end - self.start) * share

    @property
    def constant(self) -> bool:
        """True if every step has the same value."""
        return self.end in (None, self.start) and self.warmup_start in (None, self.start)

    @model_serializer(mode="wrap")
    def _plain(self, handler: Any) -> Any:
        """Serialise a constant schedule as a number, so that plans read like their recipes."""
        return self.start if self.constant else handler(self)


def _of_number(value: Any) -> Any:
    if isinstance(value, str | bool | list):
        raise ValueError(
            f"{value!r} is no number, and no schedule such as {{start: 0.04, end: 0.4}}"
        )
    return {"start": value} if isinstance(value, int | float) else value


Scheduled = Annotated[Schedule, BeforeValidator(_of_number)]
"""A field that takes a number or a schedule."""
