"""Options of fine-tuning."""

from __future__ import annotations

from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from mimray.trainers.config.base import Config, ImageSize


class FinetuneTask(Config):
    """The recipe that trains the encoder, and overrides of its keys."""

    recipe: str = Field(
        default="finetune-tiny", description="a recipe of method finetune: its name, or a path"
    )
    epochs: PositiveFloat | None = Field(default=None, description="the recipe's by default")
    image_size: ImageSize | None = Field(
        default=None,
        description="(height, width) of the input, pixels; one number for a square; "
        "the bundle's own by default",
    )
    overrides: tuple[str, ...] = Field(
        default=(),
        description="keys of the recipe, one or a list: overrides='[optim.base_lr=1e-3, "
        "resources.num_workers=2]'",
    )
    storage: str = Field(default="runs", description="where the run and its bundle are kept")
    name: str = Field(
        default="", description="name of the run; by default after the encoder and the options"
    )
    batch_size: PositiveInt = Field(default=64, description="pictures scored at once")

    @field_validator("overrides", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value
