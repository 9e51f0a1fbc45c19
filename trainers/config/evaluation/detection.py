"""Options of the detection task."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from mimray.trainers.config.evaluation.head import HeadConfig

NUM_LEVELS = 4
Fraction = Annotated[float, Field(ge=0, le=1)]


class DetectionConfig(HeadConfig):
    """Object detection from a feature pyramid over the encoder's maps."""

    detector: Literal["faster_rcnn", "retinanet", "mask_rcnn"] = Field(
        default="faster_rcnn", description="mask_rcnn needs instance masks"
    )
    pyramid_width: PositiveInt = Field(default=128, description="channels of each level; 256 usual")
    anchor_sizes: tuple[PositiveFloat, ...] | None = Field(
        default=None,
        description="sides of the anchors of each of the four levels, pixels of the input; by "
        "default from the sizes of the training boxes",
    )
    num_proposals: PositiveInt = Field(
        default=300, description="regions of each picture for the second stage of an R-CNN"
    )
    score_threshold: Fraction = Field(
        default=0.05, description="objects that score lower are not found"
    )
    nms_iou: Fraction = Field(
        default=0.5, description="IoU above which the better of two boxes of a class stays alone"
    )
    max_detections: PositiveInt = Field(
        default=100, description="objects found in a picture at most"
    )
    shown_score: Fraction = Field(default=0.3, description="objects that score lower are not drawn")

    @model_validator(mode="after")
    def _check_anchors(self) -> DetectionConfig:
        if self.anchor_sizes is not None and len(self.anchor_sizes) != NUM_LEVELS:
            raise ValueError(
                f"anchor_sizes names {len(self.anchor_sizes)} sizes, there are {NUM_LEVELS} levels"
            )
        return self
