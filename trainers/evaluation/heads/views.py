"""Views of pictures that heads learn from: numbered versions of each, of one input size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mimray.trainers.data.geometry import Placement, Size, whole_view
from mimray.trainers.data.rng import Stream, generator


def training_view(
    source_size: Size, input_size: Size, *, seed: int, index: int, number: int
) -> Placement:
    """One of a picture's numbered versions: 0 whole, 1 its mirror image, then crops in pairs.

    A crop has the shape of the input and between a quarter and all of the largest such area.

    Args:
        source_size: (height, width) of the picture.
        input_size: (height, width) of the network's input.
        seed: seed of the crops.
        index: index of the picture in its dataset.
        number: number of the version.
    """
    view = whole_view(source_size, input_size)
    if number > 1:
        rng = generator(seed, Stream.HEAD_VIEW, index, number // 2)
        height, width = source_size
        share = float(np.sqrt(rng.uniform(0.25, 1.0)))
        scale = share * min(height / input_size[0], width / input_size[1])
        rows, columns = input_size[0] * scale, input_size[1] * scale
        top, left = rng.uniform(0, height - rows), rng.uniform(0, width - columns)
        view = Placement(
            source_size, (left, top, left + columns, top + rows), input_size, input_size
        )
    return view.mirrored() if number % 2 else view


def fitting_size(
    source_sizes: Sequence[Size], stride: int, *, max_tokens: int, max_side_px: int
) -> Size:
    """An input near the pictures' own median size, rounded to the stride, within bounds.

    Args:
        source_sizes: (height, width) of each picture.
        stride: stride of the encoder, pixels.
        max_tokens: bound of the tokens, which rounding may exceed; attention is quadratic in them.
        max_side_px: bound of the longer side.
    """
    height, width = np.median(source_sizes, axis=0)
    shrink = min(
        1.0,
        max_side_px / max(height, width),
        float(np.sqrt(max_tokens * stride**2 / (height * width))),
    )
    rows, columns = (max(1, round(side * shrink / stride)) for side in (height, width))
    return rows * stride, columns * stride


def tensor_of(views: Sequence[np.ndarray]) -> Tensor:
    """Inputs of equal size as one batch, uint8 [B, C, H, W]."""
    return torch.from_numpy(np.stack(views))
