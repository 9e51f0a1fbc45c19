"""Colour changes of views, of which self-distillation needs more than other methods.

All are pure functions of their generator, and change a picture with a probability. On grayscale
pictures those that concern colour alone have no effect.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

_FACTORS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def jitter(
    rng: np.random.Generator,
    image: Image.Image,
    *,
    strengths: tuple[float, float, float, float],
    probability: float,
) -> Image.Image:
    """Change brightness, contrast, saturation and hue, in random order.

    Args:
        rng: the sample's own generator.
        image: an RGB or grayscale picture.
        strengths: the largest relative changes of brightness, contrast and saturation, in [0, 1],
            and the largest turn of the hue, a share of the whole circle, in [0, 0.5].
        probability: probability of a change.

    Source: Chen et al. 2020 (SimCLR), appendix A; the procedure torchvision names ColorJitter.
    """
    if rng.random() >= probability:
        return image
    order = np.argsort(rng.random(4), kind="stable")
    drawn = rng.uniform(-1, 1, 4) * np.array(strengths)
    for i in order:
        if i < 3:
            image = _FACTORS[i](image).enhance(float(1 + drawn[i]))
        elif image.mode == "RGB":
            image = _turn_hue(image, float(drawn[i]))
    return image


def gray(rng: np.random.Generator, image: Image.Image, *, probability: float) -> Image.Image:
    """Replace all channels by the luminance."""
    if rng.random() >= probability:
        return image
    return image.convert("L").convert(image.mode)


def blur(
    rng: np.random.Generator,
    image: Image.Image,
    *,
    probability: float,
    radius_px: tuple[float, float],
) -> Image.Image:
    """Blur by a Gaussian whose standard deviation is drawn uniformly.

    Args:
        rng: the sample's own generator.
        image: a picture at its final size.
        probability: probability of a change.
        radius_px: bounds of the standard deviation, pixels.

    Source: Caron et al. 2021 (DINO), the official code's `GaussianBlur`.
    """
    if rng.random() >= probability:
        return image
    return image.filter(ImageFilter.GaussianBlur(float(rng.uniform(*radius_px))))


def solarise(rng: np.random.Generator, image: Image.Image, *, probability: float) -> Image.Image:
    """Invert values from 128 on.

    Source: Grill et al. 2020 (BYOL), appendix B.
    """
    if rng.random() >= probability:
        return image
    return ImageOps.solarize(image, threshold=128)


def _turn_hue(image: Image.Image, share: float) -> Image.Image:
    """Turn the hue by a share of the circle; rounded as in torchvision."""
    hue, saturation, value = image.convert("HSV").split()
    turned = (np.asarray(hue, dtype=np.int16) + int(share * 255)) % 256
    hue = Image.fromarray(turned.astype(np.uint8), "L")
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")
