"""Relative positions: which offset each pair of tokens has, and tables for other grids."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import timm.layers
import torch
from torch import Tensor

from mimray.trainers.models.rel_pos import RelPosBias, resize_table


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("new", [(3, 5), (8, 11), (4, 14), (2, 3), (1, 1), (30, 40)])
def test_resize_table__a_constant_stays_constant(new: tuple[int, int], extra: int):
    table = torch.full((5 * 9 + extra, 2), 0.7)
    resized = resize_table(table, (3, 5), new)
    rows = (2 * new[0] - 1) * (2 * new[1] - 1) + extra
    close(resized, torch.full((rows, 2), 0.7))


def test_resize_table__near_offsets_and_unchanged_axes_keep_their_values():
    table = torch.randn(7 * 11 + 3, 2, generator=torch.Generator().manual_seed(0))
    old = table[:-3].view(7, 11, 2)

    assert torch.equal(resize_table(table, (4, 6), (4, 6)), table)
    taller = resize_table(table, (4, 6), (9, 6))
    assert torch.equal(taller[-3:], table[-3:])
    taller = taller[:-3].view(17, 11, 2)
    close(taller[7:10], old[2:5])  # offsets -1, 0 and 1
    close(taller[[0, -1]], old[[0, -1]])  # the farthest
    shorter = resize_table(table, (4, 6), (2, 6))[:-3].view(3, 11, 2)
    close(shorter, old[2:5])


@pytest.mark.parametrize(
    ("old", "new"), [((6, 6), (7, 9)), ((3, 5), (8, 11)), ((14, 14), (24, 32))]
)
def test_resize_table__equals_timm_where_both_axes_grow(old: Any, new: Any):
    rows, wanted = ((2 * h - 1) * (2 * w - 1) + 3 for h, w in (old, new))
    table = torch.randn(rows, 2, generator=torch.Generator().manual_seed(0))
    theirs = timm.layers.resize_rel_pos_bias_table(table, new, (wanted, 2), old)
    # timm ends its search for the growth at 1e-6, which the farthest offsets feel.
    torch.testing.assert_close(resize_table(table, old, new), theirs, rtol=0, atol=1e-3)


def test_bias__is_looked_up_by_offset_and_learns_at_any_size():
    bias = RelPosBias((3, 4), num_heads=2)
    with torch.no_grad():
        bias.relative_position_bias_table.copy_(torch.arange(5 * 7 + 3).unsqueeze(1).expand(-1, 2))

    found = bias((3, 4))[0, 1]  # T T

    for query, key in itertools.product(range(12), range(12)):
        down, across = query // 4 - key // 4, query % 4 - key % 4
        assert found[1 + query, 1 + key] == (down + 2) * 7 + across + 3
    assert (found[0, 1:] == 35).all()
    assert (found[1:, 0] == 36).all()
    assert found[0, 0] == 37
    bias((5, 2)).sum().backward()
    gradient = bias.relative_position_bias_table.grad
    assert gradient is not None
    assert gradient.sum().item() == pytest.approx(2 * 11 * 11)
