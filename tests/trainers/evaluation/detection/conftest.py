from __future__ import annotations

from collections.abc import Callable

import pytest

from mimray.trainers.bundles import BundleCard, FrozenEncoder
from mimray.trainers.config.model import EncoderConfig, SwinConfig, ViTConfig
from mimray.trainers.evaluation.features.encoders import untrained


def _card(config: EncoderConfig) -> BundleCard:
    side = 2 * config.stride
    return BundleCard(
        name="tiny",
        encoder=config,
        image_size=(side, side),
        channels=3,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
    )


@pytest.fixture
def vit() -> Callable[..., FrozenEncoder]:
    def make(patch_size: int = 8, width: int = 32) -> FrozenEncoder:
        shape = {"width": width, "depth": 2, "num_heads": 2, "patch_size": patch_size}
        return untrained(_card(ViTConfig.model_validate({"name": "vit", **shape})))

    return make


@pytest.fixture
def swin() -> FrozenEncoder:
    config = SwinConfig(
        name="swin", width=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=2
    )
    return untrained(_card(config))
