from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimray.trainers.evaluation.segmentation.patch_bank import PatchBank, nearest, patch_shares


def _unit(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    found = rng.normal(size=(rows, width))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    patches=st.integers(1, 60),
    queries=st.integers(0, 9),
    k=st.integers(1, 70),
    temperature=st.sampled_from([1e-9, 0.02, 0.3, 1e9]),
)
def test_posteriors__equal_brute_force_in_numpy(
    seed: int, patches: int, queries: int, k: int, temperature: float
) -> None:
    rng = np.random.default_rng(seed)
    bank, asked = _unit(rng, patches, 7), _unit(rng, queries, 7)
    labels = rng.dirichlet(np.ones(4), patches).astype(np.float32)
    found = PatchBank(torch.from_numpy(bank), torch.from_numpy(labels)).posteriors(
        torch.from_numpy(asked), k=k, temperature=temperature
    )
    assert found.shape == (queries, 4)
    # The products themselves are made in fp32, and a tiny temperature magnifies their last digit.
    similarity = (torch.from_numpy(asked) @ torch.from_numpy(bank).T).double().numpy()
    for row, posterior in zip(similarity, found.numpy(), strict=True):
        order = sorted(range(patches), key=lambda place: -row[place])[:k]
        weights = [np.exp((row[place] - row[order[0]]) / temperature) for place in order]
        expected = sum(w * labels[p].astype(float) for w, p in zip(weights, order, strict=True))
        np.testing.assert_allclose(posterior, expected / sum(weights), atol=2e-6)


@pytest.mark.parametrize("bank_rows", [1, 3, 64, 1000])
def test_nearest__is_exact_however_the_bank_is_cut(bank_rows: int) -> None:
    rng = np.random.default_rng(1)
    bank, asked = _unit(rng, 200, 5), _unit(rng, 30, 5)
    similarity, places = nearest(
        torch.from_numpy(asked), torch.from_numpy(bank), 10, bank_rows=bank_rows
    )
    expected = np.argsort(-(asked @ bank.T), axis=1)[:, :10]
    np.testing.assert_array_equal(places.numpy(), expected)
    np.testing.assert_allclose(
        similarity.numpy(), np.take_along_axis(asked @ bank.T, expected, axis=1), atol=1e-6
    )


def test_nearest__of_more_than_there_are_is_all_of_them() -> None:
    bank = torch.eye(3)
    _, places = nearest(bank[:1], bank, 9, bank_rows=2)
    assert sorted(places[0].tolist()) == [0, 1, 2]


def test_nearest__is_computed_in_fp32_under_autocast() -> None:
    rng = np.random.default_rng(2)
    bank = torch.from_numpy(_unit(rng, 50, 64))
    plain, _ = nearest(bank, bank, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered, _ = nearest(bank, bank, 5)
    assert torch.equal(plain, lowered)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    side=st.integers(1, 5),
    min_labelled=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
)
def test_patch_shares__equal_counting_pixel_by_pixel(
    seed: int, rows: int, columns: int, side: int, min_labelled: float
) -> None:
    mask = np.random.default_rng(seed).choice([0, 1, 2, 9], (rows * side, columns * side))
    places, shares = patch_shares(mask, (rows, columns), 3, 9, min_labelled)
    expected = {}
    for row in range(rows):
        for column in range(columns):
            part = mask[row * side : (row + 1) * side, column * side : (column + 1) * side]
            pixels = [label for label in part.ravel().tolist() if label != 9]
            if pixels and len(pixels) >= min_labelled * side * side:
                expected[row * columns + column] = [pixels.count(k) / len(pixels) for k in range(3)]
    assert places.tolist() == list(expected)
    for found, wanted in zip(shares, expected.values(), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_patch_shares__of_void_numbered_as_a_class_leave_it_out() -> None:
    mask = np.array([[0, 1], [1, 1]])
    places, shares = patch_shares(mask, (1, 1), 2, 1, 0.25)
    assert places.tolist() == [0]
    assert shares.tolist() == [[1.0, 0.0]]
