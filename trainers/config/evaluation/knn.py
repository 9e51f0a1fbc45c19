"""Options of the nearest-neighbour probe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from mimray.trainers.config.base import Config
from mimray.trainers.config.evaluation.extract import View


class KnnConfig(Config):
    """k-nearest neighbours: a weighted vote of the most similar training pictures."""

    k: PositiveInt = Field(default=20, description="neighbours of the headline")
    temperature: PositiveFloat = Field(default=0.07, description="T of a vote, exp(cosine / T)")
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
