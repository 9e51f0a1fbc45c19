"""Noise that belongs to samples: its distributions, and that only the sample counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mimray.trainers.data.rng import sample_seeds
from mimray.trainers.models.noise import DropPath, Noise


def seeds_of(count: int, start: int = 0, epoch: int = 0) -> torch.Tensor:
    seeds = sample_seeds(7, np.full(count, epoch), np.arange(start, start + count))
    return torch.from_numpy(seeds.view(np.int64))


def kept(rows: int, seeds: torch.Tensor | None, place: int = 0, drop_prob: float = 0.3) -> Any:
    path = DropPath(drop_prob, place).train()
    path.seeds = seeds
    return path(torch.ones(rows, 2, 3))[:, 0, 0]


@pytest.mark.parametrize("seeded", [True, False])
def test_drop_path__keeps_the_share_and_the_mean(seeded: bool):
    torch.manual_seed(0)

    found = kept(4000, seeds_of(4000) if seeded else None)

    torch.testing.assert_close(found[found != 0], torch.full_like(found[found != 0], 1 / 0.7))
    assert (found == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_drop_path__of_a_sample_is_its_own_whatever_the_batch():
    whole = kept(64, seeds_of(64))
    parts = [kept(16, seeds_of(16, start)) for start in range(0, 64, 16)]

    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(kept(64, seeds_of(64, epoch=1)), whole)
    assert not torch.equal(kept(64, seeds_of(64), place=1), whole)


def test_drop_path__draws_apart_for_views_and_places():
    seeds = seeds_of(2000)
    views = kept(4000, seeds).reshape(2000, 2) == 0
    places = torch.stack([kept(2000, seeds, place) == 0 for place in range(3)])

    assert np.corrcoef(views.T.numpy())[0, 1] == pytest.approx(0, abs=0.08)
    np.testing.assert_allclose(np.corrcoef(places.numpy()), np.eye(3), atol=0.08)


@pytest.mark.parametrize("place", [0, 1, 23])
def test_drop_path__draws_by_splitmix64_of_unsigned_numbers(place: int):
    seeds = seeds_of(500)
    drawn = []
    for seed in seeds.tolist():
        mixed = (seed + (place + 1) * 0x9E3779B97F4A7C15) % 2**64
        for right, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            mixed = (mixed ^ mixed >> right) * factor % 2**64
        drawn.append((mixed >> 40) / 2**24)
    expected = np.array(drawn) >= 0.3

    np.testing.assert_array_equal((kept(500, seeds, place) != 0).numpy(), expected)


def test_drop_path__is_nothing_in_evaluation():
    path, branch = DropPath(0.9, 0).eval(), torch.randn(4, 3)

    assert torch.equal(path(branch), branch)


@pytest.mark.parametrize("seeded", [True, False])
def test_noise__is_normal_or_exponential(seeded: bool):
    torch.manual_seed(0)
    noise, like = Noise(), torch.zeros(50, 40, 10)
    noise.seeds = seeds_of(50) if seeded else None

    normal, exponential = noise.normal(like), noise.exponential(like)

    assert normal.mean().item() == pytest.approx(0, abs=0.03)
    assert normal.std().item() == pytest.approx(1, abs=0.03)
    assert exponential.mean().item() == pytest.approx(1, abs=0.03)
    assert (exponential > 1).float().mean().item() == pytest.approx(np.exp(-1), abs=0.02)
    rows = normal.flatten(1).numpy()
    assert np.abs(np.corrcoef(rows) - np.eye(50)).max() < 0.25


def test_noise__of_a_sample_is_its_own_whatever_the_batch():
    noise, like = Noise(), torch.zeros(6, 5)
    noise.seeds = seeds_of(6)
    whole = noise.normal(like)
    noise.seeds = seeds_of(2, start=4)

    assert torch.equal(noise.normal(like[:2]), whole[4:])
