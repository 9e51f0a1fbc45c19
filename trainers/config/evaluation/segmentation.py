"""Options of the segmentation task."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mimray.trainers.config.evaluation.head import HeadConfig
from mimray.trainers.config.evaluation.pixel_labels import PixelLabelsConfig


class SegmentationConfig(PixelLabelsConfig, HeadConfig):
    """Semantic segmentation from the encoder's feature maps."""

    head: Literal["linear", "fpn", "upernet"] = Field(
        default="linear",
        description="linear: batch norm and a 1x1 convolution over the layers' maps side by side; "
        "fpn: a feature pyramid; upernet: that and pyramid pooling",
    )
    head_width: int = Field(default=128, ge=8, description="channels of fpn and upernet")
