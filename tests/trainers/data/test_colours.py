"""Colour changes of views, against torchvision's and Pillow's own where these have them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter
from torchvision.transforms import functional as TF

from mimray.trainers.data.colours import blur, gray, jitter, solarise


def picture(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((32, 24)).convert(mode)


class Fixed:
    """A generator whose uniform draws are known."""

    def __init__(self, *draws: float) -> None:
        self.draws = draws

    def random(self, size: int | None = None) -> float | np.ndarray:
        return 0.0 if size is None else np.arange(size, dtype=float)

    def uniform(self, low: float, high: float, size: int | None = None) -> float | np.ndarray:
        return np.array(self.draws) if size else self.draws[0]


@pytest.mark.parametrize("share", [-0.1, 0.04, 0.1])
def test_jitter__is_torchvisions(share: float):
    image = picture()
    wanted = TF.adjust_saturation(TF.adjust_contrast(TF.adjust_brightness(image, 1.3), 0.8), 1.2)
    wanted = TF.adjust_hue(wanted, share)
    draws = Fixed(0.3, -0.2, 0.2, share)

    found = jitter(draws, image, strengths=(1, 1, 1, 1), probability=0.5)

    np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


def test_blur_gray_and_solarise__are_pillows():
    image = picture()
    blurred = blur(Fixed(1.5), image, probability=1, radius_px=(0.1, 2))
    assert blurred == image.filter(ImageFilter.GaussianBlur(1.5))
    luminance = np.asarray(image.convert("L"))
    grey = np.asarray(gray(Fixed(), image, probability=1))
    assert all(np.array_equal(grey[..., c], luminance) for c in range(3))
    pixels = np.asarray(image)
    np.testing.assert_array_equal(
        np.asarray(solarise(Fixed(), image, probability=1)),
        np.where(pixels < 128, pixels, 255 - pixels),
    )


CHANGES = {
    "jitter": lambda rng, image, share: jitter(
        rng, image, strengths=(0.4, 0.4, 0.2, 0.1), probability=share
    ),
    "gray": lambda rng, image, share: gray(rng, image, probability=share),
    "blur": lambda rng, image, share: blur(rng, image, probability=share, radius_px=(0.5, 2)),
    "solarise": lambda rng, image, share: solarise(rng, image, probability=share),
}


@pytest.mark.parametrize("name", CHANGES)
def test_change__comes_as_often_as_asked_and_repeats(name: str):
    change, image = CHANGES[name], picture()
    changed = [change(np.random.default_rng(i), image, 0.3) != image for i in range(400)]
    assert np.mean(changed) == pytest.approx(0.3, abs=0.08)
    assert change(np.random.default_rng(3), image, 0) == image
    first, again = (change(np.random.default_rng(5), image, 1) for _ in range(2))
    assert first == again
    assert first != image


@pytest.mark.parametrize("name", CHANGES)
def test_change__leaves_the_mode_of_a_grayscale_picture(name: str):
    found = CHANGES[name](np.random.default_rng(0), picture("L"), 1)
    assert (found.mode, found.size) == ("L", (32, 24))
