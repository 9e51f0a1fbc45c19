"""Normalisation of stored pixels, its inverse, and resizing; on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F


def normalise(
    images: UInt8[Tensor, "B C H W"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "B C H W"]:
    """(x / 255 - mean) / std per channel, in fp32 on the pictures' own device.

    Args:
        images: stored pixels.
        mean: the mean of each channel, of pixels in [0, 1].
        std: the standard deviation of each channel, of pixels in [0, 1].
    """
    m = torch.tensor(mean, device=images.device).view(1, -1, 1, 1)
    s = torch.tensor(std, device=images.device).view(1, -1, 1, 1)
    return (images.float() / 255 - m) / s


def denormalise(
    images: Float[Tensor, "B C H W"], mean: Sequence[float], std: Sequence[float]
) -> UInt8[Tensor, "B C H W"]:
    """The inverse of `normalise`, clipped and rounded to pixels."""
    m = torch.tensor(mean, device=images.device).view(1, -1, 1, 1)
    s = torch.tensor(std, device=images.device).view(1, -1, 1, 1)
    return ((images.float() * s + m).clamp(0, 1) * 255).round().byte()


def resize(images: Float[Tensor, "B C H W"], size: tuple[int, int]) -> Float[Tensor, "B C _ _"]:
    """Resize by antialiased bicubic interpolation."""
    if images.shape[2:] == size:
        return images
    return F.interpolate(images, size, mode="bicubic", antialias=True)


def pixels_at(
    images: Float[Tensor, "B C H W"],
    mean: Sequence[float],
    std: Sequence[float],
    size: tuple[int, int],
) -> UInt8[Tensor, "B C h w"]:
    """Normalised pictures as pixels of another size.

    Args:
        images: normalised pictures.
        mean: the mean of each channel that they are normalised by.
        std: the standard deviation of each channel that they are normalised by.
        size: (height, width) of the result, pixels.
    """
    pixels = denormalise(images, mean, std).float()
    return resize(pixels, size).clamp(0, 255).round().byte()
