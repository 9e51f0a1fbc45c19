from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mimray.trainers.data.geometry import Placement, clip_boxes, whole_view
from mimray.trainers.data.transforms import inference_view
from mimray.trainers.evaluation.heads.views import training_view

sides = st.integers(6, 60)
sizes = st.tuples(sides, sides)
seeds = st.integers(0, 2**32)


@st.composite
def views(draw: st.DrawFn) -> Placement:
    """Any view that the code makes: whole, stretched or a numbered version."""
    source, size = draw(sizes), draw(sizes)
    seed, number = draw(seeds), draw(st.integers(0, 5))
    view = draw(
        st.sampled_from(
            [
                whole_view(source, size),
                whole_view(source, size, keep_aspect=False),
                training_view(source, size, seed=seed, index=3, number=number),
            ]
        )
    )
    return view.mirrored() if draw(st.booleans()) else view


def _boxes(size: tuple[int, int], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 1, (5, 2, 2)) * [size[1], size[0]]
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)


@given(views(), seeds)
def test_boxes__come_back_exactly(view: Placement, seed: int) -> None:
    boxes = _boxes(view.source_size, seed)
    there = view.boxes(boxes)
    np.testing.assert_allclose(view.boxes_back(there), boxes, rtol=0, atol=1e-9)
    assert (there[:, 2:] >= there[:, :2]).all(), "left stays left of right, mirrored or not"


@given(views(), seeds)
def test_boxes__go_where_the_transform_says(view: Placement, seed: int) -> None:
    boxes = _boxes(view.source_size, seed)
    corners = boxes[:, [0, 1, 2, 1, 0, 3, 2, 3]].reshape(-1, 4, 2)  # N 4 xy
    moved = np.concatenate([corners, np.ones((5, 4, 1))], axis=2) @ np.array(view.transform).T
    moved = moved[..., :2]
    np.testing.assert_allclose(
        view.boxes(boxes), np.concatenate([moved.min(axis=1), moved.max(axis=1)], axis=1), atol=1e-9
    )


@given(views())
def test_inverse__undoes_the_transform(view: Placement) -> None:
    there, back = np.array(view.transform), np.array(view.inverse)
    np.testing.assert_allclose(back @ there, np.eye(3), atol=1e-9)


@given(sizes, sizes, st.booleans())
def test_whole_view__has_no_offset_and_no_negative_zero(
    source: tuple[int, int], size: tuple[int, int], keep_aspect: bool
) -> None:
    view = whole_view(source, size, keep_aspect=keep_aspect)
    (height, width), (rows, columns) = source, view.shown_size
    assert repr(view.transform) == repr(
        [[columns / width, 0.0, 0.0], [0.0, rows / height, 0.0], [0.0, 0.0, 1.0]]
    )
    assert repr(view.inverse) == repr(
        [[width / columns, 0.0, 0.0], [0.0, height / rows, 0.0], [0.0, 0.0, 1.0]]
    )
    assert view.is_padded == (view.shown_size != size)
    assert keep_aspect or view.shown_size == size


@given(sizes, st.integers(1, 4), st.integers(0, 9), st.booleans(), seeds)
def test_mask__each_value_is_where_its_pixel_went_where_nothing_shrinks(
    source: tuple[int, int], times: int, more: int, flip: bool, seed: int
) -> None:
    mask = np.random.default_rng(seed).integers(0, 5, source)
    view = whole_view(source, (source[0] * times + more, source[1] * times + 2 * more))
    view = view.mirrored() if flip else view
    there = view.mask(mask, fill=255)
    assert there.shape == view.input_size
    np.testing.assert_array_equal(_at_centres(view, there), mask)
    padding = np.ones(view.input_size, bool)
    padding[: view.shown_size[0], : view.shown_size[1]] = False
    assert (there[padding] == 255).all()
    assert (there[~padding] != 255).all()


@given(sizes, st.data(), seeds)
def test_mask__a_crop_shows_its_part_alone(
    source: tuple[int, int], data: st.DataObject, seed: int
) -> None:
    top, left = data.draw(st.integers(0, source[0] - 3)), data.draw(st.integers(0, source[1] - 3))
    bottom = data.draw(st.integers(top + 2, source[0]))
    right = data.draw(st.integers(left + 2, source[1]))
    times = data.draw(st.integers(1, 4))
    size = (bottom - top) * times, (right - left) * times
    view = Placement(source, (left, top, right, bottom), size, size, flip=data.draw(st.booleans()))
    mask = np.random.default_rng(seed).integers(0, 5, source)
    there = view.mask(mask, fill=9)
    assert (there != 9).all()
    part = _at_centres(view, there)[top:bottom, left:right]
    np.testing.assert_array_equal(part, mask[top:bottom, left:right])


def _at_centres(view: Placement, mask: np.ndarray) -> np.ndarray:
    """The mask of the input, read at the place of the centre of each of the picture's pixels."""
    height, width = view.source_size
    rows, columns = np.mgrid[:height, :width] + 0.5
    places = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ np.array(view.transform).T
    x, y = np.floor(places[..., 0]).astype(int), np.floor(places[..., 1]).astype(int)
    return mask[y.clip(0, mask.shape[0] - 1), x.clip(0, mask.shape[1] - 1)]


@given(views())
@settings(max_examples=60)
def test_view__pixels_and_their_labels_stay_together(view: Placement) -> None:
    """A ramp tells of each pixel of the input which place of the picture it shows."""
    height, width = view.source_size
    rows, columns = np.mgrid[:height, :width]
    ramps = np.stack([(columns + 0.5) * 4, (rows + 0.5) * 4, np.zeros_like(rows)], axis=-1)
    picture = Image.fromarray(ramps.astype(np.uint8))
    shown = view.image(picture, "bilinear", (0.5, 0.5, 0.5)).astype(float)[:2] / 4
    place = view.mask(np.stack([columns, rows]), fill=-1) + 0.5  # what the mask says it shows
    valid = (slice(None), slice(0, view.shown_size[0]), slice(0, view.shown_size[1]))
    vertical, horizontal = view.scale
    # Half a pixel each: nearest neighbour, rounding of the ramp; shrinking averages more at edges.
    allowed = 1.0 + 0.75 / np.array([horizontal, vertical])[:, None, None]
    assert (np.abs(shown - place)[valid] <= allowed).all()


@given(sizes, sizes, seeds)
def test_boxes_and_masks__of_one_object_stay_together(
    source: tuple[int, int], size: tuple[int, int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    top, left = rng.integers(0, source[0] - 2), rng.integers(0, source[1] - 2)
    bottom, right = rng.integers(top + 2, source[0] + 1), rng.integers(left + 2, source[1] + 1)
    mask = np.zeros(source, bool)
    mask[top:bottom, left:right] = True
    view = training_view(source, size, seed=seed, index=0, number=int(rng.integers(6)))
    moved = view.mask(mask, fill=False)
    box = clip_boxes(view.boxes(np.array([[left, top, right, bottom]], float)), view.valid_region)[
        0
    ]
    if not moved.any():
        assert min(box[2] - box[0], box[3] - box[1]) <= 1.0 + 1e-6, "only slivers may vanish"
        return
    rows, columns = np.nonzero(moved)
    tight = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    assert np.abs(tight - box).max() <= 0.5 + 1e-6, "a pixel belongs where its centre lies"


def test_view__padding_has_the_colour_that_normalises_to_zero() -> None:
    pixels = whole_view((10, 20), (20, 20)).image(
        Image.new("RGB", (20, 10), (255, 255, 255)), "bicubic", (0.0, 0.5, 1.0)
    )
    assert pixels[:, 15, 3].tolist() == [0, 128, 255]
    assert (pixels[:, :10] == 255).all()


@pytest.mark.parametrize("side", [20, 10])
def test_image__of_the_whole_picture_is_that_of_inference(side: int) -> None:
    """The picture may have been decoded at a lower scale."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, 2 * side, 3)).astype(np.uint8)
    picture = Image.fromarray(pixels)
    view = whole_view((20, 40), (16, 16))
    assert view.shown_size == (8, 16)
    shown = view.image(picture, "bicubic", (0.5, 0.5, 0.5))
    np.testing.assert_array_equal(shown[:, :8], inference_view(picture, (8, 16), "bicubic"))
    assert (shown[:, 8:] == 128).all()
