"""The config of `selfdistil`: it imports configs alone, since recipes are built of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from mimray.trainers.config.composition import check_masking, check_ratio
from mimray.trainers.config.method import MethodConfig
from mimray.trainers.config.model import EncoderConfig
from mimray.trainers.config.schedule import Schedule, Scheduled


class SelfDistilConfig(MethodConfig):
    """Keys of the method."""

    implementation = "selfdistil:SelfDistil"

    name: Literal["selfdistil"]
    mask_ratio: float = Field(default=0.5, gt=0, lt=1)
    local_px: PositiveInt = 16
    prototypes: PositiveInt = 32
    momentum: Scheduled = Schedule(start=0.9, end=1.0)
    temperature: Scheduled = Schedule(start=0.07, warmup_start=0.04, warmup_steps=4)
    centre_momentum: float = 0.9
    assignment_group: PositiveInt = 1

    def check(self, encoder: EncoderConfig, image_size: tuple[int, int]) -> None:
        check_masking(self.name, encoder)
        check_ratio(self.mask_ratio, (image_size[0] // encoder.stride) ** 2)

    @property
    def assignment_pictures(self) -> int:
        return self.assignment_group
