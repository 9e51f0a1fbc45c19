from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mimray.trainers.bundles import BundleCard
from mimray.trainers.evaluation.features.encoders import untrained
from mimray.trainers.evaluation.features.map_cache import CachedEncoder


class Counting:
    """A real encoder that counts the pictures it is given."""

    def __init__(self, card: BundleCard, seed: int = 0) -> None:
        self._encoder = untrained(card, seed)
        self.card, self.depth, self.stride = card, self._encoder.depth, self._encoder.stride
        self.strides, self.widths = self._encoder.strides, self._encoder.widths
        self.num_pictures = 0

    def __call__(self, images: Tensor) -> object:
        return self._encoder(images)

    def features(
        self, images: Tensor, layers: Sequence[int] | None = None, norm: bool = True
    ) -> tuple[Tensor, ...]:
        self.num_pictures += len(images)
        return self._encoder.features(images, layers, norm)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 16, 24, generator=torch.Generator().manual_seed(0))


def test_cache__a_picture_is_encoded_once(card: BundleCard, images: Tensor, tmp_path: Path) -> None:
    encoder = Counting(card)
    cached = CachedEncoder(encoder, "a", tmp_path)  # type: ignore[arg-type]
    first = cached.features(images, (0, 1))
    again = CachedEncoder(encoder, "a", tmp_path).features(images.flip(0), (0, 1))  # type: ignore[arg-type]
    assert encoder.num_pictures == 3
    for one, other in zip(first, again, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other.flip(0))
    for one, exact in zip(first, encoder.features(images, (0, 1)), strict=True):
        assert torch.equal(one, exact.half().float()), "rounded, also on the first call"
    more = torch.cat([images, images[:1] + 1])
    before = encoder.num_pictures
    assert cached.features(more, (0, 1))[0].shape == (4, 16, 2, 3)
    assert encoder.num_pictures == before + 1, "only the new one"
    assert (cached.hits, cached.misses) == (3, 4)


def test_cache__what_shapes_a_map_is_part_of_its_name(
    card: BundleCard, images: Tensor, tmp_path: Path
) -> None:
    encoder = Counting(card)
    for identity, layers, norm, seen in (
        ("a", (0, 1), True, images),
        ("b", (0, 1), True, images),
        ("a", (1, 0), True, images),
        ("a", (0, 1), False, images),
        ("a", (0, 1), True, images[..., :16]),
        ("a", (0, 1), True, images.nextafter(torch.tensor(9.0))),
    ):
        before = encoder.num_pictures
        CachedEncoder(encoder, identity, tmp_path).features(seen, layers, norm)  # type: ignore[arg-type]
        assert encoder.num_pictures == before + 3, (identity, layers, norm)


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped"])
def test_cache__damaged_maps_are_made_again(
    card: BundleCard, images: Tensor, tmp_path: Path, damage: str
) -> None:
    encoder = Counting(card)
    exact = CachedEncoder(encoder, "a", tmp_path).features(images, (0, 1))  # type: ignore[arg-type]
    for file in tmp_path.rglob("*.npz"):
        content = bytearray(file.read_bytes())
        if damage == "flipped":
            content[len(content) // 4] ^= 0xFF
        file.write_bytes({"empty": b"", "cut": content[:-40], "flipped": content}[damage])
    cached = CachedEncoder(encoder, "a", tmp_path)  # type: ignore[arg-type]
    for one, other in zip(cached.features(images, (0, 1)), exact, strict=True):
        assert torch.equal(one, other)
    assert cached.misses == 3
    cached.features(images, (0, 1))
    assert cached.misses == 3, "mended on disk"


def test_cache__the_bound_costs_time_and_changes_nothing(
    card: BundleCard, images: Tensor, tmp_path: Path
) -> None:
    encoder = Counting(card)
    kept = CachedEncoder(encoder, "a", tmp_path / "kept")  # type: ignore[arg-type]
    none = CachedEncoder(encoder, "a", tmp_path / "none", cache_gib=0)  # type: ignore[arg-type]
    assert torch.equal(kept.features(images, (0,))[0], none.features(images, (0,))[0])
    assert not list((tmp_path / "none").rglob("*.npz"))
    none.features(images, (0,))
    assert (none.hits, none.misses) == (0, 6)


def test_cache__new_maps_lie_in_memory_as_kept_ones_do(
    card: BundleCard, images: Tensor, tmp_path: Path
) -> None:
    cached = CachedEncoder(Counting(card), "a", tmp_path)  # type: ignore[arg-type]
    new, kept = (cached.features(images, (0, 1)) for _ in range(2))
    assert [maps.stride() for maps in new] == [maps.stride() for maps in kept]
    assert all(maps.is_contiguous() for maps in new)
