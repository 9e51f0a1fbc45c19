"""Random erasing: a rectangle of a normalised picture is filled with noise.

It runs in the loop, not in the loader: the noise has unit variance per channel around the
dataset's mean, and stored pixels of 8 bits end about two deviations from it. Rectangle and noise
are functions of (seed, epoch, sample index, view).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mimray.trainers.data.rng import Stream, generator

# Bounds of the rectangle's area over the picture's, and its least aspect.
AREA = (0.02, 1 / 3)
MIN_ASPECT = 0.3
TRIES = 10


def erase(
    images: Float[Tensor, "B C H W"],
    probability: float,
    *,
    seed: int,
    epochs: np.ndarray,
    indices: np.ndarray,
    view: int = 0,
) -> Float[Tensor, "B C H W"]:
    """Fill a rectangle of some pictures with normal noise, drawn per pixel and channel.

    Args:
        images: normalised pictures, float; changed in place.
        probability: probability that a picture gets a rectangle.
        seed: the run's seed.
        epochs: int64 [B], the epoch of each sample.
        indices: int64 [B], the index of each sample in the dataset.
        view: number of the pictures' view.

    Returns:
        The same tensor.

    Source: Zhong et al. 2020, "Random Erasing Data Augmentation", Algorithm 1; bounds and noise as
        timm's `RandomErasing(mode="pixel")`, which the official MAE code fine-tunes with.
    """
    num_chans, *size = images.shape[1:]
    for image, epoch, index in zip(images, epochs, indices, strict=True):
        rng = generator(seed, Stream.ERASING, int(epoch), int(index), view)
        if rng.random() >= probability:
            continue
        top, left, height, width = _rectangle(rng, size)
        noise = rng.standard_normal((num_chans, height, width), dtype=np.float32)
        image[:, top : top + height, left : left + width] = torch.from_numpy(noise)
    return images


def _rectangle(rng: np.random.Generator, size: list[int]) -> tuple[int, int, int, int]:
    """(top, left, height, width) in pixels; all 0 if no try fits."""
    rows, columns = size
    for _ in range(TRIES):
        area = rows * columns * rng.uniform(*AREA)
        aspect = math.exp(rng.uniform(math.log(MIN_ASPECT), -math.log(MIN_ASPECT)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < rows and width < columns:
            top = int(rng.integers(0, rows - height, endpoint=True))
            left = int(rng.integers(0, columns - width, endpoint=True))
            return top, left, height, width
    return 0, 0, 0, 0
