from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimray.trainers.bundles import BundleCard, save_bundle
from mimray.trainers.config.model import ViTConfig
from mimray.trainers.evaluation.features.encoders import EncoderRef, untrained
from mimray.trainers.evaluation.score import Setting


@pytest.fixture
def card() -> BundleCard:
    return BundleCard(
        name="tiny",
        encoder=ViTConfig(name="vit", width=16, depth=2, num_heads=2, patch_size=8),
        image_size=(16, 24),
        channels=3,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
    )


@pytest.fixture
def ref(card: BundleCard, tmp_path: Path) -> EncoderRef:
    """A bundle on disk."""
    save_bundle(tmp_path / "tiny", card, untrained(card).encoder.state_dict())
    return EncoderRef.parse(str(tmp_path / "tiny"))


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """Noisy pictures of three colours, 20 of each to learn from and 6 to score on."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 6)):
        for name, colour in {"blue": (0, 0, 200), "green": (0, 200, 0), "red": (200, 0, 0)}.items():
            for number in range(count):
                noise = rng.integers(0, 56, (20 + number, 30, 3))
                path = tmp_path / "colours" / split / name / f"{number:02}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((np.array(colour) + noise).astype(np.uint8)).save(path)
    return tmp_path / "colours"


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work goes on in this process, even where another test has started Ray."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)


@pytest.fixture
def setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_ray: None
) -> Callable[..., Setting]:
    """Makes settings; the user's cache is a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(data: Path, **changes: object) -> Setting:
        given: dict[str, object] = {
            "val": None,
            "limit": None,
            "seed": 0,
            "skip_invalid": False,
            "device": "cpu",
            "folder": tmp_path,
            "progress": lambda phase, done, total: None,
        }
        return Setting(data=str(data), **(given | changes))  # type: ignore[arg-type]

    return make
