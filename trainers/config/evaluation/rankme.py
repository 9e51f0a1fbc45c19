"""Options of RankMe, the effective rank of features."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from mimray.trainers.config.base import Config


class RankMeConfig(Config):
    """Pooling of the features, and the largest number of pictures."""

    pooling: Literal["mean", "cls", "both"] = Field(
        default="mean", description="mean of the patch tokens, class token, or both side by side"
    )
    limit: PositiveInt = Field(
        default=25_600,
        description="most pictures, evenly spread; the figure settles well below this number",
    )
