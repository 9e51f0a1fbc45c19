from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mimray.trainers.data.rng import Stream, generator
from mimray.trainers.data.transforms import (
    center_crop_view,
    inference_view,
    random_crop_box,
    to_array,
    view_of,
)

SIDES = st.integers(2, 3000)


@given(
    size=st.tuples(SIDES, SIDES),
    scale=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    ratio=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)).map(sorted),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=300)
def test_crop_box__lies_in_the_picture(
    size: tuple[int, int], scale: list[float], ratio: list[float], seed: int
):
    rng = np.random.default_rng(seed)

    left, top, right, bottom = random_crop_box(rng, size, (*scale,), (*ratio,))

    assert 0 <= left < right <= size[0]
    assert 0 <= top < bottom <= size[1]


def test_crop_box__area_is_uniform_and_aspect_log_uniform():
    # On a picture this large all tries fit at these scales, so nothing is cut off.
    size, scale, ratio = (4000, 4000), (0.1, 0.5), (3 / 4, 4 / 3)
    boxes = np.array(
        [random_crop_box(generator(0, Stream.VIEW, 0, i), size, scale, ratio) for i in range(4000)]
    )
    width, height = (boxes[:, 2:] - boxes[:, :2]).T

    for values, (low, high) in (
        (width * height / 16e6, scale),
        (np.log(width / height), np.log(ratio)),
        (boxes[:, 0] / (4000 - width), (0, 1)),
        (boxes[:, 1] / (4000 - height), (0, 1)),
    ):
        quantiles = np.quantile((values - low) / (high - low), np.linspace(0, 1, 21))
        # Kolmogorov-Smirnov: 1.95 / sqrt(4000) bounds all but one sample in a thousand.
        np.testing.assert_allclose(quantiles, np.linspace(0, 1, 21), atol=0.031)


def test_crop_box__a_strip_gets_the_largest_centred_crop():
    box = random_crop_box(np.random.default_rng(0), (1000, 10), (0.9, 1.0), (3 / 4, 4 / 3))

    assert box == (493, 0, 506, 10)


def test_crop_box__whole_picture_where_nothing_may_be_cut():
    box = random_crop_box(np.random.default_rng(0), (96, 96), (1.0, 1.0), (1.0, 1.0))

    assert box == (0, 0, 96, 96)


def picture(height: int, width: int, channels: int = 3) -> Image.Image:
    rng = np.random.default_rng(0)
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))


def test_view_of__crops_then_mirrors():
    image = picture(40, 60)
    pixels = np.asarray(image)

    plain = view_of(image, (16, 24), "bicubic", (10, 5, 34, 21))
    mirrored = view_of(image, (16, 24), "bicubic", (10, 5, 34, 21), flip=True)

    np.testing.assert_array_equal(np.asarray(plain), pixels[5:21, 10:34])
    np.testing.assert_array_equal(np.asarray(mirrored), pixels[5:21, 10:34][:, ::-1])


def test_view_of__a_crop_of_the_right_size_elsewhere_is_still_a_crop():
    image = picture(16, 24)

    view = view_of(image, (16, 24), "bicubic", (4, 4, 20, 12))

    assert not np.array_equal(np.asarray(view), np.asarray(image))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_inference_view__the_whole_picture_channels_first(channels: int, interpolation: str):
    image = picture(40, 60, channels)

    view = inference_view(image, (16, 24), interpolation)

    assert (view.dtype, view.shape) == (np.uint8, (channels, 16, 24))
    assert view.flags.c_contiguous
    expected = image.resize((24, 16), Image.Resampling[interpolation.upper()])
    np.testing.assert_array_equal(view, to_array(expected))
    # A picture of the right size passes untouched.
    np.testing.assert_array_equal(inference_view(image, (40, 60), interpolation), to_array(image))


@pytest.mark.parametrize(
    "size", [(500, 375), (375, 500), (97, 64), (301, 300), (224, 224), (40, 9)]
)
@pytest.mark.parametrize("side", [224, 64])
def test_center_crop_view__equals_the_papers_by_torchvision(size: tuple[int, int], side: int):
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    resize = Resize(int(side / 0.875), interpolation=InterpolationMode.BICUBIC)
    want = to_array(Compose([resize, CenterCrop(side)])(image))

    np.testing.assert_array_equal(center_crop_view(image, (side, side), "bicubic"), want)


def test_center_crop_view__of_another_shape_covers_and_keeps_the_aspect():
    square = Image.new("RGB", (200, 200))
    square.paste((255, 255, 255), (50, 50, 150, 150))

    found = center_crop_view(square, (64, 128), "bicubic")[0] > 127

    assert found.shape == (64, 128)
    # Half the picture's side is half of 128 / 0.875 either way, of which 64 rows are shown.
    assert abs(found.any(axis=0).sum() - 73) <= 1
    assert found.any(axis=1).sum() == 64
