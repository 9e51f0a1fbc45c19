from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimray.trainers.data import masks
from mimray.trainers.data.masks import (
    block_mask,
    inverse_block_mask,
    place_block,
    random_mask,
    unit_mask,
)
from mimray.trainers.data.rng import Stream, generator

BEIT = {"max_hidden": 75, "min_block_patches": 16, "min_block_aspect": 0.3}


@given(
    grid=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    ratio=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=200)
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


@pytest.mark.parametrize(
    ("grid", "unit", "ratio", "units"),
    [((6, 6), 1, 0.6, 22), ((14, 14), 2, 0.6, 30), ((14, 14), 1, 0.5, 98), ((4, 10), 2, 0.5, 5)],
)
def test_unit_mask__rounds_as_published_code_does(
    grid: tuple[int, int], unit: int, ratio: float, units: int
):
    mask = unit_mask(generator(0, Stream.MASK, 0), grid, unit, ratio)

    assert mask.sum() == units * unit**2


@given(
    units=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    unit=st.integers(1, 4),
    ratio=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=200)
def test_unit_mask__hides_whole_units(units: tuple[int, int], unit: int, ratio: float, seed: int):
    rows, columns = units

    mask = unit_mask(np.random.default_rng(seed), (rows * unit, columns * unit), unit, ratio)

    assert (mask.dtype, mask.shape) == (np.bool_, (rows * columns * unit**2,))
    picture = mask.reshape(rows * unit, columns * unit)
    corners = picture[::unit, ::unit]
    assert corners.sum() == math.ceil(rows * columns * ratio)
    for (row, column), hidden in np.ndenumerate(picture):
        assert hidden == corners[row // unit, column // unit]


def test_unit_mask__every_unit_and_every_pair_alike():
    draws = np.stack(
        [unit_mask(generator(0, Stream.MASK, 0, i), (4, 12), 2, 0.5) for i in range(20_000)]
    ).astype(float)

    # Five standard deviations of 20 000 draws at 1/2 are 0.0177.
    assert np.abs(draws.mean(axis=0) - 0.5).max() < 0.0177
    units = draws.reshape(-1, 2, 2, 6, 2)[:, :, 0, :, 0].reshape(-1, 12)
    together = units.T @ units / len(units)
    assert np.abs(together[~np.eye(12, dtype=bool)] - 6 * 5 / (12 * 11)).max() < 0.0158


class Draw(NamedTuple):
    """One sample: its mask, and (top, left, height, width) of the blocks placed."""

    mask: np.ndarray
    blocks: list[tuple[int, int, int, int]]


def published_block_mask(
    rng: Any, grid: tuple[int, int], max_hidden: int, least: int, aspect: float
) -> Draw:
    """BEiT's masking as its paper and code describe it, patch by patch.

    Args:
        rng: anything with `uniform` and an inclusive `randint`, as Python's `random` has.
    """
    rows, columns = grid
    hidden: set[tuple[int, int]] = set()
    blocks = []
    tries = 0
    while len(hidden) < max_hidden and tries < 10:
        tries += 1
        left_over = max_hidden - len(hidden)
        area = rng.uniform(least, left_over)
        ratio = math.exp(rng.uniform(math.log(aspect), math.log(1 / aspect)))
        height = int(round(math.sqrt(area * ratio)))
        width = int(round(math.sqrt(area / ratio)))
        if not (width < columns and height < rows):
            continue
        top, left = rng.randint(0, rows - height), rng.randint(0, columns - width)
        covered = {(top + y, left + x) for y in range(height) for x in range(width)}
        if 0 < len(covered - hidden) <= left_over:
            hidden |= covered
            blocks.append((top, left, height, width))
            tries = 0
    mask = np.array([(y, x) in hidden for y in range(rows) for x in range(columns)])
    return Draw(mask, blocks)


class AsPythonRandom:
    """A numpy generator that answers as Python's `random` does."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.rng.random()

    def randint(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high, endpoint=True))


def recorded_block_mask(rng: np.random.Generator, grid: tuple[int, int], **options: Any) -> Draw:
    """`block_mask`, noting the blocks that it places."""
    blocks = []

    def record(*args: Any) -> tuple[slice, slice] | None:
        block = place_block(*args)
        if block is not None:
            rows, columns = block
            sides = rows.stop - rows.start, columns.stop - columns.start
            blocks.append((int(rows.start), int(columns.start), *sides))
        return block

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "place_block", record)
        return Draw(block_mask(rng, grid, **options), blocks)


@pytest.mark.parametrize(
    ("grid", "max_hidden", "least", "aspect"),
    [
        ((14, 14), 75, 16, 0.3),  # BEiT
        ((14, 14), 78, 15, 0.3),  # MaskFeat
        ((8, 8), 25, 4, 0.3),
        ((5, 20), 40, 16, 0.3),
        ((6, 3), 17, 1, 0.1),
        ((9, 9), 30, 30, 1.0),
    ],
)
def test_block_mask__given_the_same_numbers_equals_the_published_procedure(
    grid: tuple[int, int], max_hidden: int, least: int, aspect: float
):
    for i in range(500):
        ours = recorded_block_mask(
            generator(0, Stream.MASK, i),
            grid,
            max_hidden=max_hidden,
            min_block_patches=least,
            min_block_aspect=aspect,
        )
        numbers = AsPythonRandom(generator(0, Stream.MASK, i))
        theirs = published_block_mask(numbers, grid, max_hidden, least, aspect)

        assert ours.blocks == theirs.blocks
        if theirs.blocks:
            np.testing.assert_array_equal(ours.mask, theirs.mask)


@pytest.fixture(scope="module")
def draws() -> tuple[list[Draw], list[Draw]]:
    """10 000 masks of ours, and of the published procedure with Python's own generator."""
    grid, numbers = (14, 14), random.Random(0)
    ours = [recorded_block_mask(generator(0, Stream.MASK, i), grid, **BEIT) for i in range(10_000)]
    theirs = [published_block_mask(numbers, grid, *BEIT.values()) for _ in range(10_000)]
    return ours, theirs


FIGURES = {
    "patches hidden": lambda draw: [draw.mask.sum()],
    "blocks": lambda draw: [len(draw.blocks)],
    "area of the first block": lambda draw: [math.prod(draw.blocks[0][2:])],
    "area of the last block": lambda draw: [math.prod(draw.blocks[-1][2:])],
    "aspect of the first block": lambda draw: [draw.blocks[0][2] / draw.blocks[0][3]],
    "aspect of the last block": lambda draw: [draw.blocks[-1][2] / draw.blocks[-1][3]],
    "top of the first block": lambda draw: [draw.blocks[0][0]],
    "left of the first block": lambda draw: [draw.blocks[0][1]],
}


@pytest.mark.parametrize("figure", FIGURES)
def test_block_mask__is_distributed_as_the_published_one(
    draws: tuple[list[Draw], list[Draw]], figure: str
):
    ours, theirs = (
        Counter(value for draw in side for value in FIGURES[figure](draw)) for side in draws
    )

    # Two-sample Kolmogorov-Smirnov at one in ten thousand: 2.22 x sqrt(2 / 10 000).
    values = sorted(ours.keys() | theirs.keys())
    gap = np.cumsum([ours[value] - theirs[value] for value in values]) / 10_000
    assert np.abs(gap).max() < 0.0315


def test_block_mask__hides_as_many_as_beit_says(draws: tuple[list[Draw], list[Draw]]):
    ours, theirs = (np.stack([draw.mask for draw in side]) for side in draws)
    counts = ours.sum(axis=1)

    assert counts.max() == 75  # 38.3 % of 196
    assert len(set(counts)) > 5
    assert counts.mean() == pytest.approx(74.5, abs=0.15)
    # By place; five standard deviations of the difference of two shares of 10 000 draws.
    assert np.abs(ours.mean(axis=0) - theirs.mean(axis=0)).max() < 0.035


def test_block_mask__blocks_keep_their_bounds(draws: tuple[list[Draw], list[Draw]]):
    ours, _ = draws
    first = np.array([draw.blocks[0] for draw in ours])
    top, left, height, width = first.T

    # Sides are rounded from areas of 16 to 75 and aspects of 0.3 to 1 / 0.3.
    assert height.min() == width.min() == 2
    assert height.max() == width.max() == 13  # less than the grid's 14
    assert ((height - 0.5) * (width - 0.5) <= 75).all()
    assert ((height + 0.5) * (width + 0.5) >= 16).all()
    assert ((height + 0.5) / (width - 0.5) >= 0.3).all()
    assert ((height - 0.5) / (width + 0.5) <= 1 / 0.3).all()
    assert (top.min(), (top + height).max()) == (0, 14)
    assert (left.min(), (left + width).max()) == (0, 14)


@given(
    data=st.data(),
    grid=st.tuples(st.integers(1, 16), st.integers(1, 16)).filter(lambda grid: grid != (1, 1)),
)
@settings(max_examples=300)
def test_block_mask__hides_something_and_never_more_than_allowed(
    data: st.DataObject, grid: tuple[int, int]
):
    n = grid[0] * grid[1]
    max_hidden = data.draw(st.integers(1, n - 1))
    options = {
        "max_hidden": max_hidden,
        "min_block_patches": data.draw(st.integers(1, max_hidden)),
        "min_block_aspect": data.draw(st.floats(0.05, 1)),
    }
    seed = data.draw(st.integers(0, 2**32))

    mask = block_mask(np.random.default_rng(seed), grid, **options)

    assert (mask.dtype, mask.shape) == (np.bool_, (n,))
    assert 1 <= mask.sum() <= max_hidden
    np.testing.assert_array_equal(mask, block_mask(np.random.default_rng(seed), grid, **options))


def test_block_mask__a_grid_that_fits_no_block_loses_one_patch_anywhere():
    options = {"max_hidden": 5, "min_block_patches": 2, "min_block_aspect": 0.3}

    draws = [block_mask(generator(0, Stream.MASK, i), (1, 8), **options) for i in range(2000)]

    # Five standard deviations of 2000 draws at 1/8 are 0.037.
    assert {int(draw.sum()) for draw in draws} == {1}
    assert np.abs(np.mean(draws, axis=0) - 1 / 8).max() < 0.037


def test_masks__are_functions_of_their_generators():
    grid = (14, 14)
    for draw in (lambda rng: unit_mask(rng, grid, 2, 0.6), lambda r: block_mask(r, grid, **BEIT)):
        one, same, other = (draw(generator(0, Stream.MASK, 3, i)) for i in (8, 8, 9))

        np.testing.assert_array_equal(one, same)
        assert not np.array_equal(one, other)


@given(
    data=st.data(),
    grid=st.tuples(st.integers(1, 20), st.integers(1, 20)).filter(lambda grid: grid != (1, 1)),
    aspect=st.floats(0.05, 1),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=500)
def test_inverse_block_mask__hides_exactly_as_many_as_asked_on_any_grid(
    data: st.DataObject, grid: tuple[int, int], aspect: float, seed: int
):
    n = grid[0] * grid[1]
    num_hidden = data.draw(st.integers(1, n - 1))

    def draw() -> np.ndarray:
        rng = np.random.default_rng(seed)
        return inverse_block_mask(rng, grid, num_hidden=num_hidden, min_block_aspect=aspect)

    mask = draw()

    assert (mask.dtype, mask.shape) == (np.bool_, (n,))
    assert mask.sum() == num_hidden
    np.testing.assert_array_equal(mask, draw())


def test_inverse_block_mask__leaves_one_rectangle_filled_row_by_row():
    seen = set()
    for i in range(200):
        rng = generator(0, Stream.MASK, i)
        mask = inverse_block_mask(rng, (14, 16), num_hidden=145, min_block_aspect=0.5)
        visible = ~mask.reshape(14, 16)
        # Unrolled: the first row and column are those after a hidden one.
        rows, columns = visible.any(axis=1), visible.any(axis=0)
        first = [int(np.flatnonzero(a & ~np.roll(a, 1))[0]) for a in (rows, columns)]
        visible = np.roll(visible, [-first[0], -first[1]], axis=(0, 1))
        height, width = rows.sum(), columns.sum()
        np.testing.assert_array_equal(
            visible[:height, :width].ravel(), np.arange(height * width) < 79
        )
        assert height * width >= 79  # 14 x 16 - 145
        seen.add((int(height), int(width)))
    # Sides by rounding up: sqrt(79 / 2) = 6.3 to sqrt(79 x 2) = 12.6.
    assert {side for sides in seen for side in sides} <= set(range(6, 14))
    assert min(height for height, _ in seen) <= 7
    assert min(width for _, width in seen) <= 7


def test_inverse_block_mask__every_place_alike():
    draws = np.mean(
        [
            inverse_block_mask(
                generator(0, Stream.MASK, i), (6, 9), num_hidden=35, min_block_aspect=0.5
            )
            for i in range(20_000)
        ],
        axis=0,
    )

    # Binomial spread: five standard deviations of 20 000 draws at 35 / 54 are 0.0169.
    assert np.abs(draws - 35 / 54).max() < 0.0169
