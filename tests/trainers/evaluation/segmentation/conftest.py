from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from mimray.trainers.bundles import BundleCard, FrozenEncoder
from mimray.trainers.config.model import EncoderConfig, SwinConfig, ViTConfig
from mimray.trainers.data.synth import write_scenes
from mimray.trainers.evaluation.features.encoders import untrained

VIT = ViTConfig(name="vit", width=48, depth=4, num_heads=3, patch_size=8)
SWIN = SwinConfig(
    name="swin", width=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), patch_size=2, window_size=4
)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("segmentation") / "scenes"
    write_scenes(out, num_train=24, num_val=8, image_size=(48, 64), num_classes=2)
    return out


def make_card(config: EncoderConfig, image_size: tuple[int, int]) -> BundleCard:
    return BundleCard(
        name=config.name,
        encoder=config,
        image_size=image_size,
        channels=3,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        layers=(0, 1, 2, 3),
    )


@pytest.fixture
def make_vit() -> Callable[[], FrozenEncoder]:
    return partial(untrained, make_card(VIT, (48, 64)))


@pytest.fixture
def make_swin() -> Callable[[], FrozenEncoder]:
    return partial(untrained, make_card(SWIN, (32, 32)))
