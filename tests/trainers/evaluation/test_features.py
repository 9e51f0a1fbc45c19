from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trainers.bundles import BundleCard, FrozenEncoder
from trainers.config.model import ViTConfig
from trainers.data.sources import open_source
from trainers.data.transforms import inference_view
from trainers.errors import DataError
from trainers.evaluation.features import chosen, extract, untrained
from trainers.models.normalise import normalise

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@pytest.fixture
def encoder() -> FrozenEncoder:
    shape = ViTConfig(name="vit", width=16, depth=1, num_heads=2, patch_size=8)
    card = BundleCard(
        name="tiny", encoder=shape, image_size=(16, 24), channels=3, mean=MEAN, std=STD
    )
    return untrained(card)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(10):
        path = tmp_path / "data" / ("cat" if number < 6 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (30 + number, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return tmp_path / "data"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_extract__pooled_tokens_of_whole_pictures(
    encoder: FrozenEncoder, folder: Path, num_workers: int
):
    source, seen = open_source(str(folder)), []

    features, labels = extract(
        encoder,
        source,
        batch_size=4,
        num_workers=num_workers,
        device="cpu",
        progress=lambda done, total: seen.append((done, total)),
    )

    assert (features.dtype, features.shape) == (np.float32, (10, 16))
    assert labels.tolist() == [0] * 6 + [1] * 4
    assert seen == [(4, 10), (8, 10), (10, 10)]
    for path, row in zip(sorted(folder.rglob("*.png")), features, strict=True):
        view = inference_view(Image.open(path), (16, 24), "bicubic")
        alone = encoder(normalise(torch.from_numpy(view)[None], MEAN, STD)).pooled[0]
        np.testing.assert_allclose(row, alone.numpy(), atol=1e-5)


def test_extract__a_limit_keeps_every_class(encoder: FrozenEncoder, folder: Path):
    source = open_source(str(folder))

    features, labels = extract(encoder, source, limit=4, num_workers=0, device="cpu")

    whole, _ = extract(encoder, source, num_workers=0, device="cpu")
    assert labels.tolist() == [0, 0, 0, 1]
    np.testing.assert_allclose(features, whole[[0, 2, 5, 7]], atol=1e-6)


def test_extract__needs_labels_and_sound_pictures(encoder: FrozenEncoder, folder: Path):
    (folder / "dog/7.png").write_bytes((folder / "dog/7.png").read_bytes()[:200])
    with pytest.raises(DataError, match=r"dog/7\.png"):
        extract(encoder, open_source(str(folder)), num_workers=0, device="cpu")
    with pytest.raises(DataError, match="has no labels"):
        extract(encoder, open_source(str(folder / "cat")), num_workers=0, device="cpu")


def test_untrained__is_seeded_and_leaves_the_generator_alone(encoder: FrozenEncoder):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)

    again, other = untrained(encoder.card), untrained(encoder.card, seed=1)

    assert torch.equal(torch.rand(3), expected)
    name = "encoder.blocks.0.attn.qkv.weight"
    assert torch.equal(again.state_dict()[name], encoder.state_dict()[name])
    assert not torch.equal(other.state_dict()[name], encoder.state_dict()[name])


def test_chosen__evenly_spread():
    assert chosen(10, None).tolist() == list(range(10))
    assert chosen(10, 99).tolist() == list(range(10))
    assert chosen(10, 3).tolist() == [0, 3, 6]
