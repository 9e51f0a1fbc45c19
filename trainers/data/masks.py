"""Masks of a picture's patches; True = hidden. Pure functions of the generator they are given."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool


def random_mask(
    rng: np.random.Generator, grid: tuple[int, int], mask_ratio: float
) -> Bool[np.ndarray, N]:
    """Hide a uniformly random subset of patches of fixed size.

    Args:
        rng: a generator of this sample's own.
        grid: (rows, columns).
        mask_ratio: share hidden; int(N * (1 - mask_ratio)) patches stay visible.

    Returns:
        bool [N], True = hidden.

    Source: He et al. 2022, sec. 3 "Masking"; the rounding is the official code's.
    """
    n = grid[0] * grid[1]
    num_visible = int(n * (1 - mask_ratio))
    mask = np.ones(n, dtype=bool)
    mask[np.argsort(rng.random(n), kind="stable")[:num_visible]] = False
    return mask
