from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimray.trainers.data.order import SampleOrder
from mimray.trainers.data.rng import Stream, generator, permutation

GROUPS = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any).map(np.array)


@given(groups=GROUPS, seed=st.integers(0, 2**63 - 1), window=st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_order__every_epoch_is_a_permutation(groups: np.ndarray, seed: int, window: int):
    order, n = SampleOrder(groups, seed, window), int(groups.sum())

    epochs, indices = order.take(0, 3 * n)

    assert epochs.tolist() == [0] * n + [1] * n + [2] * n
    for epoch in indices.reshape(3, n):
        assert sorted(epoch.tolist()) == list(range(n))


@given(
    groups=GROUPS,
    window=st.integers(1, 40),
    cuts=st.lists(st.tuples(st.integers(0, 200), st.integers(1, 60)), min_size=1, max_size=6),
)
@settings(max_examples=100, deadline=None)
def test_order__take_is_a_seek(groups: np.ndarray, window: int, cuts: list[tuple[int, int]]):
    long_epochs, long_indices = SampleOrder(groups, 7, window).take(0, 260)
    jumping = SampleOrder(groups, 7, window)

    for position, count in cuts:  # forwards and backwards, on one object and on fresh ones
        for order in (jumping, SampleOrder(groups, 7, window)):
            epochs, indices = order.take(position, count)
            np.testing.assert_array_equal(epochs, long_epochs[position : position + count])
            np.testing.assert_array_equal(indices, long_indices[position : position + count])


def test_order__epochs_and_seeds_differ():
    order, other = (SampleOrder(np.full(20, 50), seed, 200) for seed in (0, 1))

    first, second = order.take(0, 1000)[1], order.take(1000, 1000)[1]

    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other.take(0, 1000)[1])


@given(groups=GROUPS, window=st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_order__a_window_is_a_few_whole_groups(groups: np.ndarray, window: int):
    order, n = SampleOrder(groups, 3, window), int(groups.sum())
    group_of_row = np.repeat(np.arange(len(groups)), groups)
    touched = group_of_row[order.take(0, n)[1]]

    # From its first row on, a group is used up within the window and the group across its end.
    for group in np.unique(touched):
        places = np.flatnonzero(touched == group)
        assert places[-1] - places[0] < window + groups.max()
    # And each group is read exactly once an epoch by a reader that holds one window.
    assert len(touched) == n


def test_order__memory_of_one_window_is_enough():
    rows, window = 64, 512
    order = SampleOrder(np.full(96, rows), 0, window)

    groups = order.take(0, 96 * rows)[1].reshape(-1, window) // rows

    for held in groups:
        assert len(np.unique(held)) == window // rows
    # Groups come from all over the dataset, and rows of a window are well mixed.
    assert np.ptp(np.unique(groups[0])) > 30
    assert (np.diff(groups[0]) != 0).mean() > 0.7


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
