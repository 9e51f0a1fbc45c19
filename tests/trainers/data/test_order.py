from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimray.trainers.data.cache import MEMORY_BYTES
from mimray.trainers.data.order import SampleOrder
from mimray.trainers.data.parts import MIN_OPEN_PARTS, OPEN_BYTES, cut_groups
from mimray.trainers.data.rng import Stream, generator, permutation

GROUPS = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any).map(np.array)


OPEN = st.one_of(st.none(), st.integers(1, 14))


@given(groups=GROUPS, seed=st.integers(0, 2**63 - 1), window=st.integers(1, 40), opened=OPEN)
@settings(max_examples=150)
def test_order__every_epoch_is_a_permutation(
    groups: np.ndarray, seed: int, window: int, opened: int | None
):
    order, n = SampleOrder(groups, seed, window, opened), int(groups.sum())

    epochs, indices = order.take(0, 3 * n)

    assert epochs.tolist() == [0] * n + [1] * n + [2] * n
    for epoch in indices.reshape(3, n):
        assert sorted(epoch.tolist()) == list(range(n))


@given(
    groups=GROUPS,
    window=st.integers(1, 40),
    opened=OPEN,
    cuts=st.lists(st.tuples(st.integers(0, 200), st.integers(1, 60)), min_size=1, max_size=6),
)
@settings(max_examples=100)
def test_order__take_is_a_seek(
    groups: np.ndarray, window: int, opened: int | None, cuts: list[tuple[int, int]]
):
    long_epochs, long_indices = SampleOrder(groups, 7, window, opened).take(0, 260)
    jumping = SampleOrder(groups, 7, window, opened)

    for position, count in cuts:  # forwards and backwards, on one object and on fresh ones
        for order in (jumping, SampleOrder(groups, 7, window, opened)):
            epochs, indices = order.take(position, count)
            np.testing.assert_array_equal(epochs, long_epochs[position : position + count])
            np.testing.assert_array_equal(indices, long_indices[position : position + count])


@pytest.mark.parametrize("opened", [None, 5])
def test_order__epochs_and_seeds_differ(opened: int | None):
    order, other = (SampleOrder(np.full(20, 50), seed, 200, opened) for seed in (0, 1))

    first, second = order.take(0, 1000)[1], order.take(1000, 1000)[1]

    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other.take(0, 1000)[1])


# ImageNet, sorted: 1,000 classes of 1,281 rows.
CLASSES = np.repeat(np.arange(1000), 1281)
UNIFORM = 1000 * (1 - 0.999**1024)  # classes in a batch of 1,024 drawn from all rows


def in_groups(rows: int, row_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and bytes of the row groups of sorted ImageNet."""
    full, rest = divmod(len(CLASSES), rows)
    group_rows = np.array([rows] * full + [rest] * (rest > 0))
    return group_rows, group_rows * row_bytes


def in_parts(group_rows: np.ndarray, num_parts: np.ndarray) -> np.ndarray:
    """Rows of the parts of row groups, as the source cuts them."""
    pairs = zip(group_rows, num_parts, strict=True)
    return np.concatenate([np.diff(rows * np.arange(n + 1) // n) for rows, n in pairs])


# Pictures of 3 KB are all open at once, those of 110 KB are not by far.
@pytest.mark.parametrize("row_bytes", [3_000, 110_000])
@pytest.mark.parametrize("rows", [100, 1000, 10_000])
def test_order__a_batch_of_a_sorted_dataset_has_as_many_classes_as_a_shuffled_one(
    rows: int, row_bytes: int
):
    group_rows, group_bytes = in_groups(rows, row_bytes)
    num_parts, opened = cut_groups(group_rows, group_bytes, spread=True)
    order = SampleOrder(in_parts(group_rows, num_parts), 0, 8192, opened)
    starts = np.linspace(0, len(CLASSES) - 1024, 60).astype(int)

    found = [len(np.unique(CLASSES[order.take(int(at), 1024)[1]])) for at in starts]

    assert abs(np.mean(found) / UNIFORM - 1) < 0.05
    assert np.min(found) > 0.9 * UNIFORM
    assert (num_parts == 1).all() == (row_bytes == 3_000)


def test_order__row_groups_of_all_sizes_are_mixed():
    group_rows = np.random.default_rng(0).choice([10, 100, 1000, 10_000], 460)
    classes = np.arange(group_rows.sum()) * 1000 // group_rows.sum()
    num_parts, opened = cut_groups(group_rows, group_rows * 110_000, spread=True)
    order = SampleOrder(in_parts(group_rows, num_parts), 0, 8192, opened)
    starts = np.linspace(0, len(classes) - 1024, 40).astype(int)

    found = [len(np.unique(classes[order.take(int(at), 1024)[1]])) for at in starts]

    assert abs(np.mean(found) / UNIFORM - 1) < 0.05


def test_order__classes_that_follow_each_other_in_one_row_group_are_mixed():
    order = SampleOrder(np.full(128, 10_000), 0, 8192, 127)
    classes = np.arange(1_280_000) // 1280

    found = [len(np.unique(classes[order.take(at, 1024)[1]])) for at in range(0, 10**6, 50_000)]

    assert abs(np.mean(found) / UNIFORM - 1) < 0.05


def loads(group: np.ndarray, group_bytes: np.ndarray, held_bytes: int) -> np.ndarray:
    """Loads of each group by a reader that keeps the latest groups.

    Args:
        group: the group of each row, in the order of reading.
        group_bytes: sizes of the groups.
        held_bytes: bytes of groups that are kept.
    """
    found, held, num_bytes = np.zeros(len(group_bytes), dtype=int), OrderedDict[int, int](), 0
    sizes = group_bytes.tolist()
    for g in group.tolist():
        if g in held:
            held.move_to_end(g)
            continue
        found[g] += 1
        held[g] = sizes[g]
        num_bytes += sizes[g]
        while num_bytes > held_bytes:
            num_bytes -= held.popitem(last=False)[1]
    return found


@pytest.mark.parametrize(("rows", "row_bytes"), [(100, 110_000), (1000, 30_000)])
def test_order__a_part_is_read_once_an_epoch(rows: int, row_bytes: int):
    group_rows, group_bytes = in_groups(rows, row_bytes)
    num_parts, opened = cut_groups(group_rows, group_bytes, spread=True)
    part_rows = in_parts(group_rows, num_parts)
    part_of_row = np.repeat(np.arange(len(part_rows)), part_rows)
    order = SampleOrder(part_rows, 0, 8192, opened)

    read = part_of_row[order.take(0, 300_000)[1]]
    found = loads(read, part_rows * row_bytes, 2 * OPEN_BYTES)  # the default of data.cache_mib

    assert found.max() == 1
    assert opened >= MIN_OPEN_PARTS
    # Not more is open than the bound: what is in use from its first row to its last.
    first, last = np.full(len(part_rows), len(read)), np.zeros(len(part_rows), dtype=int)
    np.minimum.at(first, read, np.arange(len(read)))
    np.maximum.at(last, read, np.arange(len(read)))
    at = 150_000
    assert ((first <= at) & (at <= last)).sum() * rows * row_bytes / num_parts[0] < 2 * OPEN_BYTES


@pytest.mark.parametrize("row_bytes", [2_000, 15_000, 110_000, 3_000_000])
def test_order__a_row_group_in_random_order_is_read_once_an_epoch(row_bytes: int):
    rows = max((4 << 20) // row_bytes, 1)  # as ingest writes them
    group_rows = np.full(300_000 // rows if rows > 1 else 3_000, rows)
    num_parts, opened = cut_groups(group_rows, group_rows * row_bytes, spread=False)
    order = SampleOrder(group_rows, 0, 8192, opened)

    read = order.take(0, order.num_samples)[1] // rows

    assert (num_parts == 1).all()
    assert (loads(read, group_rows * row_bytes, MEMORY_BYTES) == 1).all()
    # Groups come from all over the dataset, and rows of a window are well mixed.
    assert np.ptp(read[:1000]) > 0.8 * len(group_rows)
    assert (np.diff(read) != 0).mean() > 0.9


def test_order__single_pictures_are_shuffled_over_the_whole_dataset():
    order = SampleOrder(np.ones(5000, dtype=np.int64), 0, 8)

    first = order.take(0, 500)[1]

    assert np.histogram(first, bins=5, range=(0, 5000))[0].min() > 60


def test_generator__is_named_not_carried():
    names = [(0, s, a, b) for s in (Stream.VIEW, Stream.MASK) for a in (0, 1) for b in (0, 1)]
    names.append((1, Stream.VIEW, 0, 0))

    draws = {name: tuple(generator(*name).random(4)) for name in names}

    assert len(set(draws.values())) == len(names)
    for name in reversed(names):
        assert tuple(generator(*name).random(4)) == draws[name]


@pytest.mark.parametrize("n", [0, 1, 1000])
def test_permutation__holds_each_once(n: int):
    assert sorted(permutation(generator(0, Stream.VIEW, 0), n)) == list(range(n))
