"""Options of tasks that read a class for each pixel."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mimray.trainers.config.base import Config


class PixelLabelsConfig(Config):
    """Classes of pixels, void, the split, and the windows that pictures are seen through."""

    class_names: tuple[str, ...] | None = Field(
        default=None, description="names of the classes, by index; the data's own by default"
    )
    num_classes: PositiveInt | None = Field(
        default=None,
        description="number of classes; by default those named, or those in training masks",
    )
    ignore_index: NonNegativeInt | None = Field(
        default=None,
        description="value of void pixels in index masks; 255 by default, but for masks that hold "
        "0 and 255 alone and so two classes",
    )
    val_split: str | None = Field(
        default=None, description="the split to score on; a validation or else a test split"
    )
    scale: PositiveFloat | None = Field(
        default=None,
        description="pixels of the input to one of the picture: 1 for full resolution, where "
        "pictures are learnt from and seen through windows of image_size; "
        "by default each picture is fitted into one window",
    )
    window_overlap: float = Field(
        default=1 / 3, ge=0, lt=1, description="least share of a window that the next one covers"
    )

    @model_validator(mode="after")
    def _check_classes(self) -> PixelLabelsConfig:
        if self.class_names and self.num_classes not in (None, len(self.class_names)):
            raise ValueError(
                f"num_classes {self.num_classes} and {len(self.class_names)} class_names"
            )
        return self
