"""Configuration of iBOT: self-distillation of whole views and of hidden patches."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from mimray.trainers.config.composition import check_masking, check_ratio, check_size
from mimray.trainers.config.method import CollapseGuard, GramToStart, Size, num_patches_of
from mimray.trainers.config.model import EncoderConfig, ViTConfig
from mimray.trainers.config.schedule import Schedule, Scheduled
from mimray.trainers.errors import ConfigError
from mimray.trainers.types import DatasetFacts

Share = Annotated[float, Field(ge=0, le=1)]


class IBOTConfig(CollapseGuard, GramToStart):
    """iBOT (Zhou et al. 2022): a teacher that follows, for whole views and for hidden patches."""

    implementation = "mimray.trainers.methods.ibot:IBOT"

    name: Literal["ibot"]
    masking: Literal["block", "random"] = Field(default="block", description="shape of the mask")
    mask_ratio: tuple[float, float] = Field(
        default=(0.1, 0.5),
        description="least and largest share of patches hidden of a masked view, drawn uniformly; "
        "one number for both",
    )
    masked_share: Share = Field(
        default=0.5, description="probability that a global view is masked at all"
    )
    min_block_aspect: float = Field(
        default=0.3, gt=0, le=1, description="least aspect of a block; the largest is its inverse"
    )
    num_local: NonNegativeInt = Field(
        default=10, description="small views of a picture beside the two global ones; 0 for none"
    )
    local_px: PositiveInt = Field(default=96, description="side of a small view, pixels")
    local_scale: tuple[float, float] = Field(
        default=(0.05, 0.25),
        description="area of a small view's crop over the picture's; global views are of "
        "data.crop_scale",
    )
    jitter: tuple[Share, Share, Share, Annotated[float, Field(ge=0, le=0.5)]] = Field(
        default=(0.4, 0.4, 0.2, 0.1),
        description="largest change of brightness, contrast, saturation and hue of a view",
    )
    jitter_share: Share = Field(default=0.8, description="probability of that change")
    gray_share: Share = Field(default=0.2, description="probability that a view is gray")
    blur_share: tuple[Share, Share, Share] = Field(
        default=(1.0, 0.1, 0.5),
        description="probabilities that the first global, the second and a small view are blurred",
    )
    blur_px: tuple[float, float] = Field(
        default=(0.1, 2.0), description="bounds of the blur's standard deviation, pixels"
    )
    solarise_share: Share = Field(
        default=0.2, description="probability that the second global view is solarised"
    )
    head_width: PositiveInt = Field(default=2048, description="width of the head's hidden layers")
    bottleneck_width: PositiveInt = Field(
        default=256, description="width of the vectors that are compared with the prototypes"
    )
    num_prototypes: int = Field(default=8192, ge=2, description="prototypes K of a head")
    shared_head: bool = Field(
        default=True, description="the same prototypes for whole views and for patches"
    )
    trains_gain: bool = Field(
        default=True,
        description="train a gain of each prototype; false, as published for ViT-B, is steadier",
    )
    student_temperature: PositiveFloat = Field(
        default=0.1, description="divisor of the student's scores"
    )
    temperature: Scheduled = Field(
        default=Schedule(start=0.04),
        description="divisor of the teacher's scores of whole views: a number, or a schedule",
    )
    patch_temperature: Scheduled = Field(
        default=Schedule(start=0.04),
        description="divisor of the teacher's scores of patches: a number, or a schedule",
    )
    centring: Literal["mean", "sinkhorn"] = Field(
        default="mean",
        description="mean: a moving mean of the teacher's scores is subtracted; sinkhorn: they are "
        "balanced over assignment_group pictures",
    )
    centre_momentum: Share = Field(default=0.9, description="mean: momentum of the moving mean")
    assignment_group: PositiveInt | None = Field(
        default=None, description="sinkhorn: pictures, by position in the global batch"
    )
    sinkhorn_rounds: PositiveInt = Field(default=3, description="sinkhorn: rounds of scaling")
    momentum: Scheduled = Field(
        default=Schedule(start=0.996, end=1.0),
        description="momentum of the teacher: .996 goes with batches of 1024, .9995 with 256",
    )
    patch_weight: float = Field(default=1.0, ge=0, description="weight of the loss of patches")
    pooling: Literal["cls", "mean"] = Field(
        default="cls",
        description="what stands for a whole view, and the bundle's pooling: the class token, or "
        "the mean of the patches",
    )

    @field_validator("mask_ratio", mode="before")
    @classmethod
    def _one_ratio(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int | float) else value

    @model_validator(mode="after")
    def _check_keys(self) -> IBOTConfig:
        for key, (low, high) in {
            "mask_ratio": self.mask_ratio,
            "local_scale": self.local_scale,
        }.items():
            if not 0 < low <= high <= 1:
                raise ValueError(
                    f"method.{key} [{low:g}, {high:g}] must rise and lie above 0 and at most at 1"
                )
        if not 0 <= self.blur_px[0] <= self.blur_px[1]:
            raise ValueError(f"method.blur_px {list(self.blur_px)} must rise from 0 or more")
        for key in ("temperature", "patch_temperature"):
            if min(_ends(getattr(self, key))) <= 0:
                raise ValueError(f"method.{key} must be above 0 at every step")
        momenta = _ends(self.momentum)
        if not all(0 <= value <= 1 for value in momenta) or min(momenta) == 1:
            raise ValueError(
                f"method.momentum {', '.join(f'{value:g}' for value in momenta)}: a momentum is at "
                "least 0 and below 1, which only the end of a schedule may reach"
            )
        self._check_centring()
        return self

    def _check_centring(self) -> None:
        fields = type(self).model_fields
        if self.centring == "sinkhorn" and self.assignment_group is None:
            raise ValueError(
                "method.centring sinkhorn balances over a fixed number of pictures, which "
                "method.assignment_group does not say; set it to the micro batches of all workers "
                "together, or a divisor"
            )
        keys = (
            ("assignment_group", "sinkhorn_rounds")
            if self.centring == "mean"
            else ("centre_momentum",)
        )
        foreign = [f"method.{k}" for k in keys if getattr(self, k) != fields[k].default]
        if foreign:
            raise ValueError(f"{', '.join(foreign)}: of no use to centring {self.centring}")

    def check_encoder(self, encoder: EncoderConfig) -> None:
        """Require tokens to hide, and a class token where it stands for the view."""
        check_masking(self.name, encoder)
        if self.pooling == "cls" and not (isinstance(encoder, ViTConfig) and encoder.class_token):
            raise ValueError(
                f"encoder {encoder.name} has no class token to stand for a view; "
                "method.pooling mean goes with it"
            )

    def check(self, encoder: EncoderConfig, image_size: Size) -> None:
        """Require patches both hidden and visible, and small views of whole patches."""
        num_patches = num_patches_of(encoder, image_size)
        least, largest = self.mask_ratio
        check_ratio(largest, num_patches)
        if int(num_patches * least) < 1:
            raise ValueError(
                f"method.mask_ratio {list(self.mask_ratio)} may hide no patch of {num_patches} at "
                f"this image and patch size; the least share that hides one is {1 / num_patches:g}"
            )
        if not self.num_local:
            return
        stride, side = encoder.stride, self.local_px
        if side % stride:
            below, above = side // stride * stride, (side // stride + 1) * stride
            raise ValueError(
                f"method.local_px {side} is not a whole number of patches of {stride} pixels; "
                f"nearest {'are' if below else 'is'} "
                f"{f'{below} and {above}' if below else above}"
            )
        if side > min(image_size):
            raise ValueError(
                f"method.local_px {side} is more than data.image_size "
                f"{image_size[0]}x{image_size[1]}, the size of the global views"
            )
        try:
            check_size(encoder, (side, side))
        except ValueError as error:
            raise ValueError(f"method.local_px {side}: {error}") from None

    def check_data(self, facts: DatasetFacts, num_places: int, global_batch: int) -> None:
        """Require as many pictures as prototypes, and a bound of entropy that a batch can reach."""
        if facts.num_samples < self.num_prototypes:
            raise ConfigError(
                f"method.num_prototypes {self.num_prototypes} is more than the "
                f"{facts.num_samples} pictures of {facts.uri}, so that not every prototype could "
                "stand for one",
                hint=f"--set method.num_prototypes={_power_of_two(facts.num_samples / 2)}, or more "
                "pictures",
            )
        most = math.log(2 * global_batch) / math.log(self.num_prototypes)
        if self.min_entropy_share >= most:
            raise ConfigError(
                f"method.min_entropy_share {self.min_entropy_share:g} would take every run for "
                f"collapsed: the 2 x {global_batch} global views of a batch reach at most "
                f"log {2 * global_batch} / log {self.num_prototypes} = {most:.3f}",
                hint="a larger optim.batch_size, fewer method.num_prototypes, or a lower bound",
            )

    def advice(self, num_places: int, global_batch: int) -> list[str]:
        """Warn of a teacher that is no sharper than the student."""
        return [
            f"method.{key} {max(_ends(getattr(self, key))):g} is not below "
            f"method.student_temperature {self.student_temperature:g}: a teacher that is no "
            "sharper than its student lets the outputs collapse; published runs have .04 to .07 "
            "against .1"
            for key in ("temperature", "patch_temperature")
            if max(_ends(getattr(self, key))) >= self.student_temperature
        ]

    @property
    def exported_momentum(self) -> Schedule:
        """The teacher's momentum."""
        return self.momentum

    @property
    def assignment_pictures(self) -> int:
        """Pictures over which Sinkhorn balances; 1 where a mean is subtracted."""
        return self.assignment_group or 1

    @property
    def pooled_by(self) -> Literal["mean", "cls"]:
        """The pooling that stands for a whole view."""
        return self.pooling


def _ends(schedule: Schedule) -> list[float]:
    """The values between which a schedule moves."""
    values = (schedule.start, schedule.end, schedule.warmup_start)
    return [value for value in values if value is not None]


def _power_of_two(number: float) -> int:
    """The largest power of two up to a number, at least 2."""
    return int(2 ** max(1, math.floor(math.log2(max(number, 2)))))
