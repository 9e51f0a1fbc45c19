from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimray.trainers.evaluation.heads.views import training_view

sides = st.integers(6, 60)
sizes = st.tuples(sides, sides)
seeds = st.integers(0, 2**32)


@given(sizes, sizes, seeds, st.integers(0, 50), st.integers(0, 7))
def test_training_view__shows_the_picture_alone_and_repeats(
    source: tuple[int, int], size: tuple[int, int], seed: int, index: int, number: int
) -> None:
    view = training_view(source, size, seed=seed, index=index, number=number)
    assert view == training_view(source, size, seed=seed, index=index, number=number)
    left, top, right, bottom = view.crop
    assert -1e-9 <= left < right <= source[1] + 1e-9
    assert -1e-9 <= top < bottom <= source[0] + 1e-9
    assert view.flip == bool(number % 2)
    if number > 1:
        assert view.scale[0] == pytest.approx(view.scale[1]), "a crop keeps its shape"
        assert not view.is_padded
    assert view.mirrored() == training_view(source, size, seed=seed, index=index, number=number ^ 1)
