"""Masks of a picture's patches, True = hidden; pure functions of their generator."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool

BLOCK_TRIES = 10


def random_mask(
    rng: np.random.Generator, grid: tuple[int, int], mask_ratio: float
) -> Bool[np.ndarray, N]:
    """Hide a uniformly random subset of patches of fixed size.

    Args:
        rng: the sample's own generator.
        grid: (rows, columns) of patches.
        mask_ratio: share of patches hidden; int(N * (1 - mask_ratio)) of them stay visible.

    Returns:
        bool [N], True = hidden.

    Source: He et al. 2022, sec. 3 "Masking"; the rounding is the official code's.
    """
    n = grid[0] * grid[1]
    num_visible = int(n * (1 - mask_ratio))
    mask = np.ones(n, dtype=bool)
    mask[_shuffled(rng, n)[:num_visible]] = False
    return mask


def unit_mask(
    rng: np.random.Generator, grid: tuple[int, int], unit_patches: int, mask_ratio: float
) -> Bool[np.ndarray, N]:
    """Hide a uniformly random subset of square units of patches.

    Args:
        rng: the sample's own generator.
        grid: (rows, columns) of patches, multiples of `unit_patches`.
        unit_patches: side of a unit in patches; 1 hides single patches.
        mask_ratio: share of units hidden; ceil(units * mask_ratio) of them are.

    Returns:
        bool [N], True = hidden, row-major over the patches.

    Source: Xie et al. 2022, sec. 3.2; the rounding is the official code's (`data_simmim.py`).
    """
    rows, columns = grid[0] // unit_patches, grid[1] // unit_patches
    num_hidden = math.ceil(rows * columns * mask_ratio)
    units = np.zeros(rows * columns, dtype=bool)
    units[_shuffled(rng, rows * columns)[:num_hidden]] = True
    patches = units.reshape(rows, columns).repeat(unit_patches, axis=0)
    return patches.repeat(unit_patches, axis=1).ravel()


def block_mask(
    rng: np.random.Generator,
    grid: tuple[int, int],
    *,
    max_hidden: int,
    min_block_patches: int,
    min_block_aspect: float,
) -> Bool[np.ndarray, N]:
    """Hide rectangles of patches, one after another, until the budget is spent or none fits.

    So the number of hidden patches varies from sample to sample. On a grid that no rectangle fits,
    such as one of a single row, one random patch is hidden instead, so that there is always
    something to predict.

    Args:
        rng: the sample's own generator.
        grid: (rows, columns) of patches.
        max_hidden: largest number of patches hidden, 1 to N - 1.
        min_block_patches: least area drawn for a block, patches, before rounding; blocks are
            smaller if less of the budget is left.
        min_block_aspect: least height over width of a block, at most 1; the largest is its
            inverse.

    Returns:
        bool [N], True = hidden.

    Source: Bao et al. 2022, Algorithm 1 and the official code (`masking_generator.py`).
    """
    rows, columns = grid
    assert 0 < max_hidden < rows * columns
    hidden = np.zeros(grid, dtype=bool)
    while (budget := max_hidden - int(hidden.sum())) > 0:
        block = place_block(rng, hidden, budget, min_block_patches, min_block_aspect)
        if block is None:
            break
        hidden[block] = True
    if not hidden.any():
        hidden.flat[rng.integers(hidden.size)] = True
    return hidden.ravel()


def place_block(
    rng: np.random.Generator,
    hidden: Bool[np.ndarray, "h w"],
    budget: int,
    min_block_patches: int,
    min_block_aspect: float,
) -> tuple[slice, slice] | None:
    """Find a rectangle that newly hides at least one patch, and no more than the budget.

    Args:
        rng: the sample's own generator.
        hidden: the patches hidden so far, True = hidden.
        budget: largest number of patches that it may newly hide.
        min_block_patches: least area of a block, as for `block_mask`.
        min_block_aspect: least aspect of a block, as for `block_mask`.

    Returns:
        Rows and columns of the rectangle, always smaller than the grid along both axes; None
        after ten tries without success.
    """
    rows, columns = hidden.shape
    widest = math.log(1 / min_block_aspect)
    for _ in range(BLOCK_TRIES):
        # Not the generator's `uniform`, which would refuse a budget below min_block_patches.
        area = min_block_patches + (budget - min_block_patches) * rng.random()
        aspect = math.exp(rng.uniform(-widest, widest))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= rows or width >= columns:
            continue
        top = rng.integers(rows - height, endpoint=True)
        left = rng.integers(columns - width, endpoint=True)
        block = slice(top, top + height), slice(left, left + width)
        if 0 < height * width - hidden[block].sum() <= budget:
            return block
    return None


def inverse_block_mask(
    rng: np.random.Generator,
    grid: tuple[int, int],
    *,
    num_hidden: int,
    min_block_aspect: float,
) -> Bool[np.ndarray, N]:
    """Hide all but one rectangle of patches, which may wrap around the picture's edges.

    A rectangle of a random aspect that holds the visible patches is filled row by row until they
    are used up, and then shifted circularly, so that every place is hidden alike.

    Args:
        rng: the sample's own generator.
        grid: (rows, columns) of patches.
        num_hidden: patches hidden, 1 to N - 1, in every mask.
        min_block_aspect: least height over width of the rectangle, at most 1; the largest is its
            inverse. On grids that no such rectangle fits, the nearest aspect that does.

    Returns:
        bool [N], True = hidden.

    Source: Darcet et al. 2025, sec. 3.3 "inverse block masking" with a random circular shift; the
        rounding is the official code's.
    """
    rows, columns = grid
    num_visible = rows * columns - num_hidden
    assert 0 < num_visible < rows * columns
    # Beyond these, a rectangle is higher or wider than the grid.
    lowest, highest = num_visible / columns**2, rows**2 / num_visible
    least = min(max(min_block_aspect, lowest), highest)
    largest = max(min(1 / min_block_aspect, highest), lowest)
    aspect = math.exp(rng.uniform(math.log(least), math.log(largest)))
    # The bounds are rounded, and so may be a side that equals the grid's.
    height = min(rows, math.ceil(math.sqrt(num_visible * aspect)))
    width = min(columns, math.ceil(math.sqrt(num_visible / aspect)))
    assert height * width >= num_visible
    row, column = np.divmod(np.arange(num_visible), width)
    hidden = np.ones(grid, dtype=bool)
    hidden[(row + rng.integers(rows)) % rows, (column + rng.integers(columns)) % columns] = False
    return hidden.ravel()


def _shuffled(rng: np.random.Generator, n: int) -> np.ndarray:
    """0 to n - 1 in random order."""
    return np.argsort(rng.random(n), kind="stable")
