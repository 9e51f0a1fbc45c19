from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from mimray.trainers.evaluation.segmentation.inference import (
    learning_view,
    predict,
    scaled_size,
    window_views,
)

sides = st.integers(5, 90)
sizes = st.tuples(sides, sides)


def _brightness(inputs: Tensor) -> Tensor:
    """A network that looks at each pixel alone: class 1 where red is over a half."""
    red = inputs[:, 0].float() / 255 - 0.5  # B H W
    return torch.stack([-red, red], dim=1)


def _predict(pictures: list[Image.Image], **changes: object) -> list[np.ndarray]:
    given: dict[str, object] = {
        "input_size": (32, 32),
        "scale": 1.0,
        "overlap": 0.25,
        "batch_size": 4,
        "interpolation": "bicubic",
        "fill": (0.5, 0.5, 0.5),
    }
    return list(predict(pictures, _brightness, **(given | changes)))  # type: ignore[arg-type]


@given(sizes, sizes, st.sampled_from([None, 0.5, 1.0, 1.7]), st.floats(0, 0.9))
def test_windows__cover_the_picture_and_stay_inside(
    source: tuple[int, int], size: tuple[int, int], scale: float | None, overlap: float
) -> None:
    scaled = scaled_size(source, size, scale)
    views = window_views(source, size, scale, overlap)
    count = np.zeros(scaled, int)
    for view, (top, left) in views:
        assert view.input_size == size
        count[top : top + view.shown_size[0], left : left + view.shown_size[1]] += 1
        assert 0 <= view.crop[0] < view.crop[2] <= source[1]
        assert 0 <= view.crop[1] < view.crop[3] <= source[0]
    assert (count > 0).all()
    if scale is None or all(side <= window for side, window in zip(scaled, size, strict=True)):
        assert len(views) == 1
    tops = sorted({top for _, (top, _) in views})
    if len(tops) > 1:
        assert max(np.diff(tops)) <= np.ceil(max(1.0, size[0] * (1 - overlap)))


@pytest.mark.parametrize("size", [(32, 32), (20, 32), (50, 75)])
def test_predict__windows_say_of_each_pixel_what_one_window_says(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    picture = Image.fromarray(pixels)
    (one,) = _predict([picture], input_size=(96, 96))
    (many,) = _predict([picture])
    expected = (pixels[..., 0] > 127.5).astype(int)
    np.testing.assert_array_equal(one, expected)
    np.testing.assert_array_equal(many, expected)


def test_predict__overlapping_logits_are_averaged() -> None:
    """Each window answers with one constant, its number in the order they are laid."""
    seen = 0

    def numbered(inputs: Tensor) -> Tensor:
        nonlocal seen
        numbers = torch.arange(seen, seen + len(inputs)).float()
        seen += len(inputs)
        answer = numbers[:, None, None].expand(-1, 2, 2)
        return torch.stack([answer, torch.full_like(answer, 0.75)], dim=1)

    (found,) = predict(
        [Image.new("RGB", (12, 8))],
        numbered,
        input_size=(8, 8),
        scale=1.0,
        overlap=0.5,
        batch_size=1,
        interpolation="bicubic",
        fill=(0, 0, 0),
    )
    assert seen == 2
    # Columns 0-3 hear 0, columns 4-7 the mean of 0 and 1, columns 8-11 hear 1; against 0.75.
    np.testing.assert_array_equal(found, np.tile([1] * 8 + [0] * 4, (8, 1)))


def test_predict__pictures_of_several_sizes_each_at_its_own_resolution() -> None:
    rng = np.random.default_rng(1)
    blocks = [rng.integers(0, 2, (2, 3)), rng.integers(0, 2, (5, 4))]
    masks = [block.repeat(16, axis=0).repeat(16, axis=1) for block in blocks]
    pictures = [Image.fromarray((255 * mask).astype(np.uint8)).convert("RGB") for mask in masks]
    for scale in (None, 0.5, 1.0):
        found = _predict(pictures, scale=scale, batch_size=3)
        for classes, mask in zip(found, masks, strict=True):
            assert classes.shape == mask.shape
            assert (classes == mask).mean() > 0.9, scale


@given(sizes, sizes, st.integers(0, 9), st.integers(0, 2**32))
def test_learning_view__crops_at_the_scale_that_is_scored(
    source: tuple[int, int], size: tuple[int, int], number: int, seed: int
) -> None:
    view = learning_view(source, size, 1.0, seed=seed, index=4, number=number)
    assert view.scale == pytest.approx((1.0, 1.0))
    assert view.flip == bool(number % 2)
    assert view.shown_size == (min(source[0], size[0]), min(source[1], size[1]))
    assert view == learning_view(source, size, 1.0, seed=seed, index=4, number=number)
