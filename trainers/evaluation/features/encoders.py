"""Encoders by reference: a bundle, or an untrained one to hold it against."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from pydantic import TypeAdapter
from torch import Tensor

from mimray.trainers.bundles import (
    BundleCard,
    FrozenEncoder,
    fetch_bundle,
    load_bundle,
    read_card,
    spread_layers,
)
from mimray.trainers.config.data import IMAGENET_MEAN, IMAGENET_STD
from mimray.trainers.config.model import SWIN_SHAPES, VIT_SHAPES, EncoderConfig
from mimray.trainers.errors import ConfigError
from mimray.trainers.models import build_encoder
from mimray.trainers.registry import locate, registered
from mimray.trainers.storage import RunDir
from mimray.trainers.types import Features

UNTRAINED = "untrained:"


class FeatureEncoder(Protocol):
    """An encoder as tasks see it, be it a bundle at hand or an endpoint far away.

    Attributes:
        card: description of the encoder.
        depth: layers it has.
        stride: pixels between neighbouring output tokens.
        strides: stride of each layer's map, pixels.
        widths: channels of each layer's map.
    """

    card: BundleCard
    depth: int
    stride: int
    strides: tuple[int, ...]
    widths: tuple[int, ...]

    def __call__(self, images: Tensor) -> Features:
        """Features of normalised pictures, float [B, C, H, W]."""
        ...

    def features(
        self, images: Tensor, layers: Sequence[int] | None = None, norm: bool = True
    ) -> tuple[Tensor, ...]:
        """Maps [B, widths[layer], H / strides[layer], W / strides[layer]] of layers."""
        ...


MakeEncoder = Callable[[], FeatureEncoder]
"""Makes the encoder where it is needed: picklable, so that Ray may carry it to a worker."""


@dataclass(frozen=True)
class EncoderRef:
    """An encoder by name, small enough to travel; `load` makes it.

    Attributes:
        text: the reference as the user wrote it.
        bundle: path or URI of a bundle; empty where the shape is named.
        registered: the version in the registry, e.g. `photos@v2`, where that is how it was named.
        shape: name of a published architecture, for an untrained encoder of it.
        untrained: freshly initialised, of the bundle's or the named shape.
        image_size: (height, width) of the input, where the shape is named.
        seed: seed of the initialisation.
    """

    text: str
    bundle: str = ""
    registered: str = ""
    shape: str = ""
    untrained: bool = False
    image_size: tuple[int, int] = (224, 224)
    seed: int = 0

    @classmethod
    def parse(
        cls, text: str, *, image_size: tuple[int, int] | None = None, seed: int = 0
    ) -> EncoderRef:
        """Read what a user may write: `BUNDLE`, `NAME`, `untrained:BUNDLE`, `untrained:vit_tiny`.

        Args:
            text: the reference; a path wins over an architecture of the same name.
            image_size: (height, width) for a named architecture, 224 x 224 by default; a bundle has
                its own.
            seed: seed of an untrained encoder's initialisation.

        Raises:
            BundleError: neither a bundle nor an architecture goes by that name.
        """
        untrained = text.startswith(UNTRAINED)
        name = text.removeprefix(UNTRAINED)
        if untrained and name in (*VIT_SHAPES, *SWIN_SHAPES) and not Path(name).exists():
            return cls(
                text, shape=name, untrained=True, image_size=image_size or (224, 224), seed=seed
            )
        place = locate(name)  # refuses now what could not be loaded later
        version = registered(name)
        return cls(
            text,
            bundle=place,
            registered=version.reference if version else "",
            untrained=untrained,
            seed=seed,
        )

    @property
    def place(self) -> RunDir | None:
        """Directory of the bundle whose card takes scores; None if untrained or registered."""
        return None if self.untrained or self.registered else RunDir(self.bundle)

    def card(self) -> BundleCard:
        """Description of the encoder; its weights are not loaded."""
        if self.bundle:
            return read_card(fetch_bundle(self.bundle))
        config: EncoderConfig = TypeAdapter(EncoderConfig).validate_python({"name": self.shape})
        height, width = self.image_size
        if height % config.stride or width % config.stride:
            raise ConfigError(
                f"{height}x{width} pixels are not a multiple of the stride {config.stride} of "
                f"{self.shape}",
                hint=f"--image-size {max(1, round(height / config.stride)) * config.stride}",
            )
        return BundleCard(
            name=self.text,
            encoder=config,
            image_size=self.image_size,
            channels=3,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            layers=spread_layers(config.num_layers),
        )

    def head_card(self) -> BundleCard:
        """The card that a head trained on the encoder names; an untrained one's is its own."""
        card = self.card()
        if not self.untrained:
            return card
        return card.model_copy(update={"weights_sha256": f"{UNTRAINED}{self.seed}"})

    def load(self) -> FrozenEncoder:
        """The encoder, on the CPU."""
        return (
            untrained(self.card(), self.seed)
            if self.untrained
            else load_bundle(fetch_bundle(self.bundle))
        )

    @property
    def identity(self) -> str:
        """Digest that tells encoders with different weights apart, part of the keys of features."""
        card = self.card()
        if not self.untrained:
            return card.weights_sha256
        shape = json.dumps(
            card.model_dump(mode="json", include={"encoder", "image_size", "channels"}),
            sort_keys=True,
        )
        return hashlib.sha256(f"{UNTRAINED}{self.seed}{shape}".encode()).hexdigest()


def untrained(card: BundleCard, seed: int = 0) -> FrozenEncoder:
    """A fresh encoder of the same shape: what a score must beat to mean anything.

    Args:
        card: card of the trained encoder.
        seed: seed of the initialisation; torch's own generator keeps its state.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_encoder(card.encoder, card.image_size, card.channels)
    # A head that was trained on it must not be taken for one of the trained encoder's.
    card = card.model_copy(update={"weights_sha256": f"{UNTRAINED}{seed}"})
    return FrozenEncoder(encoder, card)


def chosen_layers(encoder: FeatureEncoder, asked: Sequence[int] | None) -> tuple[int, ...]:
    """The layers whose maps a task takes, counted from 0.

    Args:
        encoder: encoder that has the layers.
        asked: layers that the user named, negative from the end; None for the card's.

    Raises:
        ConfigError: the encoder has no such layer.
    """
    layers = tuple(asked or encoder.card.layers or spread_layers(encoder.depth))
    if any(not -encoder.depth <= layer < encoder.depth for layer in layers):
        raise ConfigError(f"layers {list(layers)}: there are 0 to {encoder.depth - 1}")
    return tuple(layer % encoder.depth for layer in layers)


def check_input(encoder: FeatureEncoder, image_size: tuple[int, int], key: str) -> None:
    """Refuse an input that the encoder's stride does not divide.

    Args:
        encoder: encoder that takes the input.
        image_size: (height, width) of the input, pixels.
        key: option that sets the size, for the message.

    Raises:
        ConfigError: with the nearest size that works.
    """
    stride = encoder.stride
    if any(side % stride or side < stride for side in image_size):
        nearest = tuple(max(1, round(side / stride)) * stride for side in image_size)
        raise ConfigError(
            f"{key}: {image_size[0]}x{image_size[1]} pixels are not a multiple of the encoder's "
            f"stride {stride}",
            hint=f"{key}={list(nearest)}",
        )
