"""Configuration of workers, devices and CPUs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
    model_serializer,
    model_validator,
)

from mimray.trainers.config.base import Config


class WorkerRange(Config):
    """Numbers of workers between which a run may change while it goes on.

    One number alone is read from a plain number and written as one.
    """

    min: PositiveInt = Field(default=1, description="fewest workers that go on")
    max: PositiveInt = Field(description="most workers, for which the run is planned")

    @model_validator(mode="after")
    def _check_order(self) -> WorkerRange:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self

    @property
    def elastic(self) -> bool:
        """True if the number may change."""
        return self.min < self.max

    @model_serializer(mode="wrap")
    def _plain(self, handler: Any) -> Any:
        return handler(self) if self.elastic else self.max


def _of_number(value: Any) -> Any:
    if isinstance(value, WorkerRange | dict):
        return value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"{value!r} is no number of workers from 1, and no range such as {{min: 2, max: 8}}"
        )
    return {"min": value, "max": value}


Workers = Annotated[WorkerRange, BeforeValidator(_of_number)]
"""A field that takes a number of workers, or a range."""


class ResourcesConfig(Config):
    """Workers, devices and CPUs that a run requests, and the failures it survives."""

    num_workers: Workers = Field(
        default=WorkerRange(min=1, max=1),
        description="workers; {min, max} to go on with fewer while nodes are missing, and to grow "
        "back when there are more",
    )
    device: Literal["auto", "cpu", "gpu"] = Field(
        default="auto", description="auto: a GPU a worker where the cluster has any"
    )
    cpus_per_worker: PositiveInt | None = Field(
        default=None, description="default: an equal share of the node, decode processes included"
    )
    max_failures: NonNegativeInt = Field(
        default=3, description="worker or node losses survived before the run gives up"
    )
    hang_timeout_s: float = Field(
        default=120,
        ge=0,
        description="seconds without a step, beyond the slowest seen, or without a sign of life, "
        "after which a worker hangs and all are started again; 0 for never",
    )
