"""Transforms of a picture: crop and augmentations of training, plain resize of inference."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance

from mimray.trainers.data.resample import to_pixels, to_planes
from mimray.trainers.data.rng import global_generators

_RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}
_JITTERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
# The share of a resized picture's side that a centre crop keeps: 224 of 256.
CROP_SHARE = 0.875
Box = tuple[float, float, float, float]


def random_crop_box(
    rng: np.random.Generator,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Box:
    """Draw a random crop of uniform area and log-uniform aspect.

    Args:
        rng: the sample's own generator.
        size: (width, height) of the picture.
        scale: bounds of the crop's area over the picture's.
        ratio: bounds of the crop's width over its height.

    Returns:
        (left, top, right, bottom) in pixels. After ten tries that do not fit, the largest
        centred crop within the aspect bounds.

    Source: Szegedy et al. 2015, sec. 6; the procedure torchvision names RandomResizedCrop.
    """
    width, height = size
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(0, width - w, endpoint=True))
            top = int(rng.integers(0, height - h, endpoint=True))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def color_jitter(rng: np.random.Generator, image: Image.Image, strength: float) -> Image.Image:
    """Scale brightness, contrast and saturation by factors in [1 - strength, 1 + strength].

    Args:
        rng: the sample's own generator.
        image: the whole picture, since contrast is about its mean.
        strength: largest relative change, in [0, 1).

    Source: Krizhevsky et al. 2012 in spirit; the procedure torchvision names ColorJitter: the
        three in random order, a factor each.
    """
    order = np.argsort(rng.random(len(_JITTERS)), kind="stable")
    factors = rng.uniform(1 - strength, 1 + strength, len(_JITTERS))
    for i in order:
        image = _JITTERS[i](image).enhance(float(factors[i]))
    return image


def auto_augment(
    rng: np.random.Generator,
    image: Image.Image,
    policy: str,
    mean: tuple[float, ...],
    interpolation: str,
) -> Image.Image:
    """Apply timm's RandAugment, drawing from the sample's generator only.

    Args:
        rng: the sample's own generator.
        image: an RGB picture at its final size.
        policy: timm's policy string, e.g. `rand-m9-mstd0.5-inc1`.
        mean: the mean of each channel, of pixels in [0, 1]; fills areas that shifts and turns leave
            empty.
        interpolation: interpolation of shifts and turns: bicubic, bilinear or lanczos.

    Source: Cubuk et al. 2020, "RandAugment"; timm's variant, with translations of at most 0.45 of
        the shorter side, as in the official MAE code (`util/datasets.py`).
    """
    augment = _rand_augment(policy, min(image.size), mean, interpolation)
    with global_generators(rng):
        return augment(image)


@functools.cache
def _rand_augment(
    policy: str, short_side_px: int, mean: tuple[float, ...], interpolation: str
) -> Callable[[Image.Image], Image.Image]:
    from timm.data.auto_augment import rand_augment_transform

    hyperparameters = {
        "translate_const": int(short_side_px * 0.45),
        "img_mean": tuple(round(255 * value) for value in mean),
        "interpolation": _RESAMPLING[interpolation],
    }
    augment: Callable[[Image.Image], Image.Image] = rand_augment_transform(policy, hyperparameters)
    return augment


def inference_view(
    image: Image.Image, image_size: tuple[int, int], interpolation: str
) -> np.ndarray:
    """Resize a whole picture to (height, width), uint8 [C, H, W]; its aspect is not kept."""
    return to_array(view_of(image, image_size, interpolation))


def center_crop_view(
    image: Image.Image, image_size: tuple[int, int], interpolation: str
) -> np.ndarray:
    """Resize a picture in its aspect to cover the view / 0.875, and cut its centre.

    Args:
        image: an RGB or grayscale picture.
        image_size: (height, width) of the result, pixels.
        interpolation: bicubic, bilinear or lanczos.

    Returns:
        uint8 [C, H, W].

    Source: the official code of DINO (`eval_knn.py`) and of MAE (`main_linprobe.py`): resize of the
        shorter side to 256, bicubic, then a centre crop of 224; sizes and offsets round as
        torchvision's `Resize` and `CenterCrop` do.
    """
    height, width = image_size
    covered = covering_size((image.height, image.width), image_size)
    image = view_of(image, covered, interpolation)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return to_array(image.crop((left, top, left + width, top + height)))


def covering_size(source_size: tuple[int, int], image_size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) that a picture is resized to before a centre crop; its aspect is kept.

    Args:
        source_size: (height, width) of the picture.
        image_size: (height, width) of the crop.
    """
    rows, columns = (int(side / CROP_SHARE) for side in image_size)
    height, width = source_size
    if rows * width >= columns * height:
        return rows, int(rows * width / height)
    return int(columns * height / width), columns


def to_array(image: Image.Image) -> np.ndarray:
    """Convert an RGB or grayscale picture to uint8 [C, H, W]."""
    return to_planes(to_pixels(image))


def view_of(
    image: Image.Image,
    image_size: tuple[int, int],
    interpolation: str,
    box: Box | None = None,
    flip: bool = False,
) -> Image.Image:
    """Resize a part of a picture, by default the whole, and flip it horizontally if asked.

    Args:
        image: an RGB or grayscale picture.
        image_size: (height, width) of the result, pixels.
        interpolation: bicubic, bilinear or lanczos.
        box: (left, top, right, bottom) of the part, pixels; None for the whole.
        flip: True to mirror the result.
    """
    height, width = image_size
    if image.size != (width, height) or box not in (None, (0, 0, width, height)):
        image = image.resize((width, height), _RESAMPLING[interpolation], box=box)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image
