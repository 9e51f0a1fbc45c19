"""Sliding windows over a picture, and one answer from several of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mimray.trainers.data.geometry import Placement, Size, whole_view
from mimray.trainers.data.rng import Stream, generator
from mimray.trainers.evaluation.annotations.base import SegmentationSet
from mimray.trainers.evaluation.heads.views import fitting_size, tensor_of, training_view

# Attention is quadratic in the tokens: by default no more than these, and no longer side.
_MAX_TOKENS = 1024
_MAX_SIDE_PX = 512
# Numbers of a picture at its own resolution, 256 MiB.
_LOGITS_AT_ONCE = 1 << 26

LogitsOf = Callable[[Tensor], Tensor]
"""From inputs uint8 [B, C, H, W] to logits [B, K, h, w] at any resolution."""


def default_size(data: SegmentationSet, stride: int) -> Size:
    """The pictures' own median size, rounded to the stride and kept within bounds.

    At most about 1024 tokens and 512 pixels a side.

    Args:
        data: dataset, of which up to 32 pictures are looked at.
        stride: stride of the encoder, pixels.
    """
    looked_at = np.linspace(0, len(data) - 1, min(32, len(data))).astype(int).tolist()
    sizes: list[Size] = [data[index].mask.shape for index in looked_at]
    return fitting_size(sizes, stride, max_tokens=_MAX_TOKENS, max_side_px=_MAX_SIDE_PX)


def scaled_size(source_size: Size, input_size: Size, scale: float | None) -> Size:
    """(height, width) that a picture is scaled to before windows are cut.

    Args:
        source_size: (height, width) of the picture.
        input_size: (height, width) of a window.
        scale: pixels of the input to one of the picture; None fits the picture into one window.
    """
    if scale is None:
        return whole_view(source_size, input_size).shown_size
    height, width = source_size
    return max(1, round(height * scale)), max(1, round(width * scale))


def window_views(
    source_size: Size, input_size: Size, scale: float | None, overlap: float
) -> list[tuple[Placement, tuple[int, int]]]:
    """Windows that cover a picture, each with its (top, left) in the scaled picture.

    They are spread evenly; where one suffices there is one.

    Args:
        source_size: (height, width) of the picture.
        input_size: (height, width) of a window.
        scale: pixels of the input to one of the picture, see `scaled_size`.
        overlap: least share of a window that the next one covers.
    """
    scaled = scaled_size(source_size, input_size, scale)
    tops, lefts = (
        _starts(side, window, overlap) for side, window in zip(scaled, input_size, strict=True)
    )
    return [
        (_window(source_size, scaled, input_size, (top, left)), (top, left))
        for top in tops
        for left in lefts
    ]


def learning_view(
    source_size: Size,
    input_size: Size,
    scale: float | None,
    *,
    seed: int,
    index: int,
    number: int,
) -> Placement:
    """One of a picture's numbered versions to learn from, at the scale it is scored at.

    Args:
        source_size: (height, width) of the picture.
        input_size: (height, width) of the network's input.
        scale: pixels of the input to one of the picture; without one the versions are
            `training_view`'s, else windows at random places, each followed by its mirror image.
        seed: seed of the places.
        index: index of the picture.
        number: number of the version.
    """
    if scale is None:
        return training_view(source_size, input_size, seed=seed, index=index, number=number)
    scaled = scaled_size(source_size, input_size, scale)
    rng = generator(seed, Stream.HEAD_VIEW, index, number // 2)
    room = [max(0, side - window) for side, window in zip(scaled, input_size, strict=True)]
    top, left = (int(rng.integers(side, endpoint=True)) for side in room)
    view = _window(source_size, scaled, input_size, (top, left))
    return view.mirrored() if number % 2 else view


@torch.no_grad()
def predict(
    pictures: Sequence[Image.Image],
    logits_of: LogitsOf,
    *,
    input_size: Size,
    scale: float | None,
    overlap: float,
    batch_size: int,
    interpolation: str,
    fill: Sequence[float],
) -> Iterator[np.ndarray]:
    """Classes of all pixels, int64 [h, w] at each picture's own resolution.

    Logits of windows that overlap are averaged.

    Args:
        pictures: upright; their windows are encoded together.
        logits_of: the network.
        input_size: (height, width) of a window.
        scale: pixels of the input to one of the picture, see `scaled_size`.
        overlap: least share of a window that the next one covers.
        batch_size: windows encoded at once.
        interpolation: filter of the resize.
        fill: colour of the padding, see `Placement.image`.
    """
    laid = [
        window_views((picture.height, picture.width), input_size, scale, overlap)
        for picture in pictures
    ]
    inputs = [
        view.image(picture, interpolation, fill)
        for picture, views in zip(pictures, laid, strict=True)
        for view, _ in views
    ]
    # Windows [B, K, h, w] in the order of the pictures.
    logits = torch.cat(
        [
            logits_of(tensor_of(inputs[start : start + batch_size])).float().cpu()
            for start in range(0, len(inputs), batch_size)
        ]
    )
    for picture, views in zip(pictures, laid, strict=True):
        windows, logits = logits[: len(views)], logits[len(views) :]
        yield merged(windows, views, (picture.height, picture.width), input_size, scale)


def merged(
    logits: Tensor,
    views: Sequence[tuple[Placement, tuple[int, int]]],
    source_size: Size,
    input_size: Size,
    scale: float | None,
) -> np.ndarray:
    """Classes of a picture's pixels, int64 [h, w], from the logits of its windows.

    Args:
        logits: of each window, float32 [n, K, h, w] at any resolution.
        views: the windows, as `window_views` gives them.
        source_size: (height, width) of the picture.
        input_size: (height, width) of a window.
        scale: pixels of the input to one of the picture, see `scaled_size`.
    """
    scaled = scaled_size(source_size, input_size, scale)
    total = logits.new_zeros(logits.shape[1], *scaled)
    count = logits.new_zeros(scaled)
    for (view, (top, left)), window in zip(views, logits, strict=True):
        height, width = view.shown_size
        full = F.interpolate(window[None], input_size, mode="bilinear", align_corners=False)
        part = (..., slice(top, top + height), slice(left, left + width))
        total[part] += full[0, :, :height, :width]
        count[part] += 1
    return _best_class(total / count, source_size)


def _best_class(logits: Tensor, size: Size) -> np.ndarray:
    """The class of the largest logit at each pixel, int64 [h, w], once enlarged to a size.

    A few classes at a time: those of a large picture together would fill the memory.
    """
    step = max(1, _LOGITS_AT_ONCE // (size[0] * size[1]))
    best: Tensor | None = None
    for start in range(0, len(logits), step):
        part = F.interpolate(
            logits[None, start : start + step], size, mode="bilinear", align_corners=False
        )
        value, index = part[0].max(dim=0)
        if best is None:
            best, classes = value, index
            continue
        larger = value > best
        classes[larger] = index[larger] + start
        best = torch.maximum(best, value)
    return classes.numpy()


def _starts(side: int, window: int, overlap: float) -> list[int]:
    """Starts of windows along one side, pixels of the scaled picture."""
    room = max(0, side - window)
    steps = math.ceil(room / max(1.0, window * (1 - overlap)))
    starts: list[int] = np.linspace(0, room, steps + 1).round().astype(int).tolist()
    return starts


def _window(source_size: Size, scaled: Size, input_size: Size, start: tuple[int, int]) -> Placement:
    """The part of the scaled picture that a window at (top, left) shows."""
    size = min(scaled[0], input_size[0]), min(scaled[1], input_size[1])
    vertical, horizontal = (whole / side for whole, side in zip(source_size, scaled, strict=True))
    top, left = start
    crop = (
        left * horizontal,
        top * vertical,
        min((left + size[1]) * horizontal, source_size[1]),
        min((top + size[0]) * vertical, source_size[0]),
    )
    return Placement(source_size, crop, size, input_size)
