"""Sinkhorn's assignments against the algorithm written out in NumPy, in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mimray.trainers.models.sinkhorn import sinkhorn


def written_out(scores: np.ndarray, temperature: float, rounds: int) -> np.ndarray:
    """The published iteration on a matrix [M, K]: columns to 1 / K of the whole, rows to one."""
    num_vectors, num_prototypes = scores.shape
    q = np.exp((scores - scores.max()) / temperature)
    q /= q.sum()
    for _ in range(rounds):
        q /= q.sum(axis=0, keepdims=True) * num_prototypes
        q /= q.sum(axis=1, keepdims=True) * num_vectors
    return q * num_vectors


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("temperature", [0.06, 1.0])
def test_assignments__equal_the_published_iteration_in_fp64(temperature: float, rounds: int):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(2, 5, 24, 7)).astype(np.float32)
    found = sinkhorn(torch.from_numpy(scores), temperature, rounds).numpy()
    for place in np.ndindex(2, 5):
        expected = written_out(scores[place].astype(np.float64), temperature, rounds)
        np.testing.assert_allclose(found[place], expected, atol=1e-5)


def test_assignments__use_prototypes_alike_and_are_shares_of_each_vector():
    scores = torch.randn(512, 8, generator=torch.Generator().manual_seed(0)) + torch.arange(8) * 9
    q = sinkhorn(scores, temperature=1.0, rounds=50)
    torch.testing.assert_close(q.sum(dim=1), torch.ones(512))
    torch.testing.assert_close(q.sum(dim=0), torch.full((8,), 64.0), rtol=0.01, atol=0)


def test_prototypes_beyond_the_reach_of_exp__are_finite_and_used():
    scores = torch.tensor([[0.0, -300.0], [0.0, -301.0]])
    q = sinkhorn(scores, temperature=0.06)
    assert q.isfinite().all()
    assert q[0, 1] > 0.5  # the nearer of the two vectors takes the far prototype


def test_autocast__does_not_reach_it():
    scores = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sinkhorn(scores.bfloat16(), 0.1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, sinkhorn(scores.bfloat16().float(), 0.1), rtol=0, atol=0)
