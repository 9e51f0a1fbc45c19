"""Normalisation of stored pixels, and its inverse; on the device, where it costs nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor


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
