from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.data.masks import random_mask
from trainers.data.rng import Stream, generator


@given(
    grid=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    ratio=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=200, deadline=None)
def test_random_mask__hides_exactly_as_many_as_asked(
    grid: tuple[int, int], ratio: float, seed: int
):
    n = grid[0] * grid[1]

    mask = random_mask(np.random.default_rng(seed), grid, ratio)

    assert (mask.dtype, mask.shape) == (np.bool_, (n,))
    assert (~mask).sum() == int(n * (1 - ratio))


@pytest.mark.parametrize(("ratio", "hidden"), [(0.75, 147), (0.6, 118), (0.9, 177)])
def test_random_mask__rounds_as_published_code_does(ratio: float, hidden: int):
    assert random_mask(generator(0, Stream.MASK, 0), (14, 14), ratio).sum() == hidden


def test_random_mask__every_patch_and_every_pair_alike():
    draws = np.stack(
        [random_mask(generator(0, Stream.MASK, 0, i), (4, 4), 0.75) for i in range(20_000)]
    ).astype(float)

    # Binomial spread: five standard deviations of 20 000 draws at 3/4 are 0.0153.
    assert np.abs(draws.mean(axis=0) - 0.75).max() < 0.0153
    together = draws.T @ draws / len(draws)
    pair = 12 * 11 / (16 * 15)  # drawn without replacement
    assert np.abs(together[~np.eye(16, dtype=bool)] - pair).max() < 0.0177


def test_random_mask__a_function_of_its_generator():
    masks = [random_mask(generator(0, Stream.MASK, 3, 8), (6, 6), 0.5) for _ in range(2)]
    other = random_mask(generator(0, Stream.MASK, 4, 8), (6, 6), 0.5)

    np.testing.assert_array_equal(*masks)
    assert not np.array_equal(masks[0], other)
