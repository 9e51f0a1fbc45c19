"""Drawings of histograms of oriented gradients: a stroke along each edge.

Arrays in, arrays out; nothing here knows a tensor or a model.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

LONG_SIDE_PX = 384  # twice a sheet's cell, so that a drawing is reduced and never enlarged

_THICKNESS = 0.12  # a stroke's thickness as a share of its cell


def draw_glyphs(
    histograms: NDArray[np.float32], *, long_side_px: int = LONG_SIDE_PX
) -> NDArray[np.uint8]:
    """Draw a star of strokes in each cell, one a bin, as bright as the bin is heavy.

    Args:
        histograms: float32 [B, R, S, K], K unsigned orientations of the gradient, counted from the
            vertical towards the falling diagonal; weights in [0, 1], others are clipped.
        long_side_px: the least length of a picture's longer side, pixels.

    Returns:
        uint8 [B, R * g, S * g, 1]: g pixels a cell; white strokes on black, along the edges and
        so perpendicular to the gradient. Where strokes cross, the brighter one is seen.
    """
    b, rows, columns, bins = histograms.shape
    side = math.ceil(long_side_px / max(rows, columns))
    canvas = np.zeros((b, rows, columns, side, side), dtype=np.float32)
    for k, stroke in enumerate(_strokes(bins, side)):
        np.maximum(canvas, histograms[..., k, None, None] * stroke, out=canvas)
    pixels = canvas.transpose(0, 1, 3, 2, 4).reshape(b, rows * side, columns * side, 1)
    return (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)


def _strokes(bins: int, side: int) -> NDArray[np.float32]:
    """A smooth stroke through the middle of a cell for each bin's central angle, [K, g, g]."""
    place = np.arange(side) - (side - 1) / 2
    y, x = np.meshgrid(place, place, indexing="ij")
    angle = ((np.arange(bins) + 0.5) * np.pi / bins)[:, None, None]
    # The gradient points to (sin, cos) in (x, y); the edge lies across it.
    off_axis = np.abs(x * np.sin(angle) + y * np.cos(angle))
    along = np.abs(x * np.cos(angle) - y * np.sin(angle))
    within = np.clip((side * _THICKNESS + 1) / 2 - off_axis, 0, 1)
    strokes: NDArray[np.float64] = within * np.clip((side - 1) / 2 - along, 0, 1)
    return strokes.astype(np.float32)
