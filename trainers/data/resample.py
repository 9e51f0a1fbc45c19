"""Resampling of the crops that training sees: torch's, on bytes, several times Pillow's speed."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

Pixels = np.ndarray
"""A picture as uint8 [H, W, C]; it may not be writable."""

IntBox = tuple[int, int, int, int]


def resampled(
    pixels: Pixels, size: tuple[int, int], interpolation: str, box: IntBox | None = None
) -> Pixels:
    """Cut a box out of a picture and resize it, with antialiasing.

    The filters are Pillow's, so that nearly all values of photographs are within a level of 255 of
    its own (`benchmarks/loading.py`). It always resamples columns before rows, and clips in between
    as Pillow does: the two differ where Pillow takes the rows first.

    Args:
        pixels: the picture.
        size: (height, width) of the result, pixels.
        interpolation: bicubic, bilinear or lanczos. Lanczos is Pillow's: torch has none.
        box: (left, top, right, bottom), pixels; None for the whole.
    """
    if box is not None:
        left, top, right, bottom = box
        pixels = pixels[top:bottom, left:right]
    if pixels.shape[:2] == size:
        return pixels
    if interpolation == "lanczos":
        height, width = size
        return to_pixels(to_image(pixels).resize((width, height), Image.Resampling.LANCZOS))
    if not pixels.flags.writeable:  # torch warns of those, though nothing is written
        pixels = pixels.copy()
    planes = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)  # 1 C H W
    found = F.interpolate(planes, size, mode=interpolation, antialias=True)
    found = found.squeeze(0).permute(1, 2, 0)  # h w C
    array: np.ndarray = found.numpy()
    return array


def to_pixels(image: Image.Image) -> Pixels:
    """The pixels of an RGB or grayscale picture."""
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def to_image(pixels: Pixels) -> Image.Image:
    """The picture of some pixels, RGB or grayscale."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def to_planes(pixels: Pixels, *, flip: bool = False) -> np.ndarray:
    """Pixels as uint8 [C, H, W], mirrored if asked."""
    return np.ascontiguousarray((pixels[:, ::-1] if flip else pixels).transpose(2, 0, 1))
