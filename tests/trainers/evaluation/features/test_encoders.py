from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mimray.trainers.bundles import BundleCard, save_bundle
from mimray.trainers.config.model import ViTConfig
from mimray.trainers.errors import BundleError, ConfigError
from mimray.trainers.evaluation.features.encoders import EncoderRef, check_input, untrained


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    shape = ViTConfig(name="vit", width=16, depth=1, num_heads=2, patch_size=8)
    card = BundleCard(
        name="tiny", encoder=shape, image_size=(16, 24), channels=3, mean=(0.5,) * 3, std=(0.2,) * 3
    )
    folder = tmp_path / "run" / "bundle"
    folder.parent.mkdir()
    save_bundle(folder, card, untrained(card, seed=5).encoder.state_dict())
    return folder.parent


def test_ref__a_run_its_untrained_twin_and_a_named_shape(bundle: Path) -> None:
    images = torch.randn(1, 3, 16, 24)
    trained = EncoderRef.parse(str(bundle))
    fresh, again = (EncoderRef.parse(f"untrained:{bundle}", seed=seed) for seed in (0, 0))
    other = EncoderRef.parse(f"untrained:{bundle}", seed=1)

    assert torch.equal(fresh.load()(images).tokens, again.load()(images).tokens)
    assert not torch.equal(fresh.load()(images).tokens, other.load()(images).tokens)
    assert not torch.equal(trained.load()(images).tokens, fresh.load()(images).tokens)
    assert len({ref.identity for ref in (trained, fresh, again, other)}) == 3
    assert trained.place is not None
    assert fresh.place is None

    named = EncoderRef.parse("untrained:vit_tiny", image_size=(32, 48))
    assert named.load().depth == 12
    assert named.card().image_size == (32, 48)
    assert named.card().layers == (2, 5, 8, 11)


@pytest.mark.parametrize(
    ("text", "size", "kind", "message"),
    [
        ("nowhere", None, BundleError, "no bundle at nowhere"),
        ("untrained:vit_gigantic", None, BundleError, "no bundle at vit_gigantic"),
        ("untrained:vit_tiny", (30, 32), ConfigError, "not a multiple of the stride 16"),
    ],
)
def test_ref__refuses(
    text: str, size: tuple[int, int] | None, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        EncoderRef.parse(text, image_size=size).card()


def test_check_input__names_a_size_that_works(bundle: Path) -> None:
    encoder = EncoderRef.parse(str(bundle)).load()
    check_input(encoder, (24, 40), "image_size")
    with pytest.raises(ConfigError, match=r"stride 8 \(image_size=\[24, 48\]\)"):
        check_input(encoder, (24, 45), "image_size")
