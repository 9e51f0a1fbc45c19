"""Options of a recipe's pictures: size, crops, normalisation, reading."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    NonNegativeInt,
    PositiveInt,
    field_validator,
    model_validator,
)

from mimray.trainers.config.base import Config

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

CACHE_MIB = 8192

_RAND_AUGMENT = re.compile(r"rand(-(m|n|mmax|inc)\d+|-(p|mstd)\d+(\.\d+)?)*")


class DataConfig(Config):
    """Preparation of stored pictures for training."""

    image_size: tuple[PositiveInt, PositiveInt] = Field(
        default=(224, 224), description="height and width in pixels; one number for a square"
    )
    channels: Literal[1, 3] = Field(default=3, description="3 reads RGB, 1 reads grayscale")
    mean: tuple[float, ...] = Field(default=(), description="a value a channel, of [0, 1] pixels")
    std: tuple[float, ...] = Field(default=(), description="a value a channel, of [0, 1] pixels")
    crop_scale: tuple[float, float] = Field(
        default=(0.2, 1.0), description="area of the random crop over the picture's; 1,1 for whole"
    )
    crop_ratio: tuple[float, float] = Field(
        default=(3 / 4, 4 / 3), description="aspect (width over height) of the random crop"
    )
    hflip: float = Field(default=0.5, ge=0, le=1, description="probability of a horizontal flip")
    color_jitter: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="brightness, contrast and saturation by up to this share, in random order",
    )
    auto_augment: str = Field(
        default="",
        description="RandAugment as timm writes it, e.g. rand-m9-mstd0.5-inc1; none by default",
    )
    random_erasing: float = Field(
        default=0.0, ge=0, le=1, description="probability that a rectangle is filled with noise"
    )
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    limit: PositiveInt | None = Field(
        default=None, description="so many pictures, evenly spread over the dataset; all by default"
    )
    num_workers: NonNegativeInt = Field(
        default=2, description="decode processes a training worker; 0 decodes in the loop"
    )
    stream: Literal["local", "ray"] = Field(
        default="local",
        description="where these are: local beside their training worker; ray anywhere on the "
        "cluster, on a CPU each, nodes without GPUs first",
    )
    prefetch_batches: PositiveInt = Field(default=4, description="batches ready a decode process")
    shuffle_window: PositiveInt = Field(
        default=8192,
        description="rows shuffled together, where the dataset is too large to shuffle all of it",
    )
    cache_mib: PositiveInt = Field(
        default=CACHE_MIB,
        description="local cache of row groups of remote Parquet, and of large Parquet that may be "
        "sorted",
    )
    decoded_cache_mib: NonNegativeInt = Field(
        default=0,
        description="pictures kept decoded for all processes of a node, in /dev/shm where it has "
        "the room; 0 for none",
    )
    on_bad: Literal["substitute", "fail"] = Field(
        default="substitute",
        description="a picture that cannot be decoded: take the next one and count it, or stop",
    )
    label: str | None = Field(
        default=None,
        description="column of the labels, where classes are learnt; by default `label`, or the "
        "only one that Hugging Face's metadata calls a ClassLabel",
    )
    val_share: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of each class that is not trained on, where the data has no split to "
        "score on; `mimray evaluate` holds out 0.2 by default",
    )
    val_seed: NonNegativeInt = Field(default=0, description="the seed that chooses these")
    bad_labels: Literal["fail", "skip"] = Field(
        default="fail",
        description="a picture without a class, or of one outside the range, where classes are "
        "learnt: stop before the run, or leave it out",
    )

    @field_validator("image_size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value

    @model_validator(mode="wrap")
    @classmethod
    def _fill_normalisation(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(data, dict):
            return handler(data)
        gray = data.get("channels", 3) == 1
        mean, std = ((0.5,), (0.5,)) if gray else (IMAGENET_MEAN, IMAGENET_STD)
        made = handler({"mean": mean, "std": std, **data})
        made.model_fields_set.difference_update({"mean", "std"} - data.keys())
        return made

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        for key in ("mean", "std"):
            if len(getattr(self, key)) != self.channels:
                raise ValueError(
                    f"data.{key} has {len(getattr(self, key))} values for {self.channels} channels"
                )
        if min(self.std) <= 0:
            raise ValueError(f"data.std {self.std} must be positive")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"data.crop_scale {self.crop_scale} must satisfy 0 < low <= high <= 1")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"data.crop_ratio {self.crop_ratio} must satisfy 0 < low <= high")
        if self.auto_augment and not _RAND_AUGMENT.fullmatch(self.auto_augment):
            raise ValueError(
                f"data.auto_augment {self.auto_augment!r} is not of timm's form: rand, then any of "
                "-mMAGNITUDE -nLAYERS -pPROBABILITY -mstdDEVIATION -mmaxMAGNITUDE -inc1, e.g. "
                "rand-m9-mstd0.5-inc1"
            )
        if self.stream == "ray" and not self.num_workers:
            raise ValueError("data.stream ray decodes in processes: data.num_workers is 0")
        if self.auto_augment and self.channels != 3:
            raise ValueError("data.auto_augment changes colours, so it needs data.channels 3")
        return self
