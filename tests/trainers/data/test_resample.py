"""Crops resampled by torch, held against Pillow's and against the filters' formulas."""

from __future__ import annotations

import functools
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mimray.trainers.data.resample import IntBox, Pixels, resampled, to_image, to_pixels, to_planes
from mimray.trainers.data.sample_photos import photograph
from mimray.trainers.data.scenes import draw_scene

WHOLE = (0, 0, 240, 180)


@functools.cache
def pictures() -> dict[str, Pixels]:
    """Pictures of 240 x 180 pixels."""
    height, width = 180, 240
    rows, columns = np.mgrid[:height, :width]
    planes = (columns * 255 / width, rows * 255 / height, (rows + columns) * 255 / (width + height))
    made = {
        "noise": np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8),
        "gradients": np.stack(planes, axis=-1).astype(np.uint8),
        "scene": draw_scene(0, 1, image_size=(height, width), num_classes=5, held_out=False).image,
    }
    for name in ("chelsea", "hubble", "motorcycle"):
        made[name] = np.array(photograph(name))[100 : 100 + height, 150 : 150 + width]
    return made


def by_pillow(pixels: Pixels, size: tuple[int, int], interpolation: str, box: IntBox) -> Pixels:
    """Pillow's crop, then its resize."""
    kept = to_image(np.ascontiguousarray(pixels)).crop(box)
    return to_pixels(kept.resize(size[::-1], Image.Resampling[interpolation.upper()]))


def columns_first(pixels: Pixels, size: tuple[int, int], interpolation: str, box: IntBox) -> Pixels:
    """As `by_pillow`, in two calls: since version 13 Pillow resizes the rows first at times."""
    height, width = size
    across = by_pillow(pixels, (box[3] - box[1], width), interpolation, box)
    return by_pillow(across, size, interpolation, (0, 0, width, box[3] - box[1]))


def apart(found: Pixels, want: Pixels) -> np.ndarray:
    assert (found.dtype, found.shape) == (np.uint8, want.shape)
    return found.astype(int) - want


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel of a = -1/2, by its two polynomials."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def triangle(x: np.ndarray) -> np.ndarray:
    return np.clip(1 - np.abs(x), 0, None)


def by_formula(pixels: Pixels, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Both filters in fp64, widened by the scale where a side shrinks; not rounded."""
    kernel = {"bicubic": cubic, "bilinear": triangle}[interpolation]

    def weights(length: int, wanted: int) -> np.ndarray:
        scale = length / wanted
        places = (np.arange(wanted)[:, None] + 0.5) * scale - (np.arange(length) + 0.5)
        found = kernel(places / max(scale, 1.0))
        return found / found.sum(axis=1, keepdims=True)  # wanted x length

    down, across = weights(pixels.shape[0], size[0]), weights(pixels.shape[1], size[1])
    return np.einsum("yh,xw,hwc->yxc", down, across, pixels.astype(np.float64))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", ["noise", "gradients", "scene", "chelsea", "hubble", "motorcycle"])
@pytest.mark.parametrize(
    ("box", "size"),
    [
        (WHOLE, (96, 96)),
        (WHOLE, (32, 48)),
        (WHOLE, (13, 17)),
        (WHOLE, (180, 91)),
        (WHOLE, (77, 240)),
        (WHOLE, (224, 300)),
        (WHOLE, (360, 480)),
        ((13, 7, 190, 161), (64, 64)),
        ((40, 30, 100, 110), (224, 224)),
        ((101, 59, 118, 71), (40, 56)),
        ((20, 10, 120, 60), (64, 64)),
    ],
    ids=str,
)
def test_resampled__is_pillows_but_for_single_levels(
    name: str, interpolation: str, box: IntBox, size: tuple[int, int]
):
    pixels = pictures()[name]

    found = resampled(pixels, size, interpolation, box)

    difference = apart(found, by_pillow(pixels, size, interpolation, box))
    # Of gradients many sums lie halfway between two levels.
    assert (difference == 0).mean() >= (0.85 if name == "gradients" else 0.97)
    assert (np.abs(difference) <= 1).mean() >= 0.999
    assert np.abs(difference).max() <= 2
    assert abs(difference.mean()) <= (0.1 if name == "gradients" else 0.02)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", ["gradients", "scene", "chelsea", "hubble", "motorcycle"])
@pytest.mark.parametrize(
    ("box", "size"),
    [((40, 30, 100, 110), (64, 64)), ((10, 10, 30, 170), (48, 96)), (WHOLE, (64, 300))],
    ids=str,
)
def test_resampled__of_fewer_rows_and_more_columns_rounds_otherwise_at_most(
    name: str, interpolation: str, box: IntBox, size: tuple[int, int]
):
    pixels = pictures()[name]

    found = resampled(pixels, size, interpolation, box)

    # Pillow may resize the rows first here, and rounds between the passes.
    difference = apart(found, by_pillow(pixels, size, interpolation, box))
    assert (difference == 0).mean() >= 0.7
    assert (np.abs(difference) <= 1).mean() >= 0.995
    assert abs(difference.mean()) <= 0.1
    difference = apart(found, columns_first(pixels, size, interpolation, box))
    assert (difference == 0).mean() >= 0.95
    assert np.abs(difference).max() <= 2


@given(
    shape=st.tuples(st.integers(1, 64), st.integers(1, 64), st.sampled_from([1, 3])),
    size=st.tuples(st.integers(1, 96), st.integers(1, 96)),
    corners=st.tuples(*[st.floats(0, 1)] * 4),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
    black_and_white=st.booleans(),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=300)
def test_resampled__is_pillows_in_columns_then_rows_whatever_the_shape(
    shape: tuple[int, int, int],
    size: tuple[int, int],
    corners: tuple[float, ...],
    interpolation: str,
    black_and_white: bool,
    seed: int,
):
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    if black_and_white:
        pixels = np.where(pixels > 127, 255, 0).astype(np.uint8)
    height, width, _ = shape
    left, right = sorted(int(corner * width) for corner in corners[:2])
    top, bottom = sorted(int(corner * height) for corner in corners[2:])
    box = (min(left, width - 1), min(top, height - 1), max(right, left + 1), max(bottom, top + 1))
    box = (*box[:2], min(box[2], width), min(box[3], height))

    found = resampled(pixels, size, interpolation, box)

    difference = apart(found, columns_first(pixels, size, interpolation, box))
    assert np.abs(difference).max() <= 2


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "size", [(7, 9), (12, 40), (40, 12), (30, 30), (23, 31), (61, 77), (1, 1), (24, 5)], ids=str
)
def test_resampled__is_the_filters_formula(interpolation: str, size: tuple[int, int]):
    rows, columns = np.mgrid[:24, :32] / 32
    waves = [np.sin(3 * columns + 2 * rows), np.cos(4 * rows), np.sin(5 * columns * rows + 1)]
    pixels = (128 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)

    found = resampled(pixels, size, interpolation)

    want = by_formula(pixels, size, interpolation)
    assert found.shape == (*size, 3)
    # Both passes round.
    assert np.abs(apart(found, np.round(want))).max() <= 1
    # To the nearest, not down: the mean is that of the formula.
    assert abs(found.mean() - want.mean()) <= (0.15 if found.size > 100 else 0.5)


def test_resampled__shrinks_with_antialiasing():
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255

    for interpolation in ("bilinear", "bicubic", "lanczos"):
        found = resampled(stripes, (16, 16), interpolation)

        np.testing.assert_allclose(found[2:-2, 2:-2], 127.5, atol=2)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("box", [WHOLE, (13, 7, 190, 161), (40, 30, 100, 110)], ids=str)
@pytest.mark.parametrize("size", [(32, 48), (100, 64), (224, 224)], ids=str)
def test_resampled__lanczos_is_pillows_to_the_bit(
    box: IntBox, size: tuple[int, int], channels: int
):
    pixels = pictures()["chelsea"][..., :channels]

    found = resampled(pixels, size, "lanczos", box)

    np.testing.assert_array_equal(found, by_pillow(pixels, size, "lanczos", box))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(32, 48), (200, 150)], ids=str)
def test_resampled__sees_nothing_beyond_the_box(interpolation: str, size: tuple[int, int]):
    pixels = pictures()["noise"]
    left, top, right, bottom = box = (13, 7, 190, 161)
    other = np.zeros_like(pixels)
    other[top:bottom, left:right] = pixels[top:bottom, left:right]

    found = resampled(pixels, size, interpolation, box)

    np.testing.assert_array_equal(resampled(other, size, interpolation, box), found)
    alone = pixels[top:bottom, left:right].copy()
    np.testing.assert_array_equal(resampled(alone, size, interpolation), found)
    np.testing.assert_array_equal(resampled(alone, size, interpolation, None), found)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_resampled__each_channel_is_resampled_alone(interpolation: str):
    pixels = pictures()["scene"]
    box = (13, 7, 190, 161)

    found = resampled(pixels, (64, 48), interpolation, box)

    for channel in range(3):
        alone = resampled(pixels[..., channel : channel + 1], (64, 48), interpolation, box)
        assert alone.shape == (64, 48, 1)
        np.testing.assert_array_equal(alone, found[..., channel : channel + 1])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("box", [None, (13, 7, 190, 161), (13, 7, 77, 55)], ids=str)
def test_resampled__what_may_not_be_written_gives_the_same_without_a_warning(
    interpolation: str, box: IntBox | None
):
    pixels = pictures()["chelsea"].copy()
    before = pixels.copy()
    locked = np.frombuffer(pixels.tobytes(), dtype=np.uint8).reshape(pixels.shape)
    assert not locked.flags.writeable
    want = resampled(pixels, (48, 64), interpolation, box)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = resampled(locked, (48, 64), interpolation, box)

    np.testing.assert_array_equal(found, want)
    np.testing.assert_array_equal(pixels, before)
    np.testing.assert_array_equal(locked, before)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("channels", [1, 3])
def test_resampled__a_box_of_the_right_size_is_the_pixels_themselves(
    interpolation: str, channels: int
):
    pixels = pictures()["noise"][..., :channels]

    whole = resampled(pixels, (180, 240), interpolation)
    part = resampled(pixels, (30, 50), interpolation, (11, 17, 61, 47))

    np.testing.assert_array_equal(whole, pixels)
    np.testing.assert_array_equal(part, pixels[17:47, 11:61])


def test_resampled__a_box_of_one_side_alike_is_still_resized():
    pixels = pictures()["noise"]

    found = resampled(pixels, (30, 50), "bicubic", (11, 17, 61, 57))

    assert found.shape == (30, 50, 3)
    assert not np.array_equal(found, pixels[17:47, 11:61])
    assert np.abs(apart(found, by_pillow(pixels, (30, 50), "bicubic", (11, 17, 61, 57)))).max() <= 2


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels__go_to_pillow_and_back(mode: str):
    image = to_image(pictures()["scene"]).convert(mode)

    pixels = to_pixels(image)

    assert (pixels.dtype, pixels.shape) == (np.uint8, (180, 240, len(image.getbands())))
    assert to_image(pixels).mode == mode
    assert to_image(pixels).tobytes() == image.tobytes()


@pytest.mark.parametrize("channels", [1, 3])
def test_to_planes__channels_come_first_and_rows_are_mirrored_if_asked(channels: int):
    pixels = pictures()["noise"][..., :channels]

    plain, mirrored = to_planes(pixels), to_planes(pixels, flip=True)

    assert plain.flags.c_contiguous
    assert mirrored.flags.c_contiguous
    np.testing.assert_array_equal(plain, np.moveaxis(pixels, -1, 0))
    np.testing.assert_array_equal(mirrored, np.moveaxis(np.fliplr(pixels), -1, 0))
