from __future__ import annotations

import numpy as np
import pytest
import torch

from mimray.trainers.glyphs import draw_glyphs
from mimray.trainers.models.hog import HOG


def histogram(k: int, weight: float = 1.0, bins: int = 9) -> np.ndarray:
    """One picture of one cell."""
    return (np.arange(bins) == k).astype(np.float32).reshape(1, 1, 1, bins) * weight


def main_axis(pixels: np.ndarray) -> float:
    """Angle of the longer axis of what is drawn, degrees above the horizontal, in [0, 180)."""
    y, x = np.indices(pixels.shape) - (np.array(pixels.shape) - 1).reshape(2, 1, 1) / 2
    weight = pixels / pixels.sum()
    covariance = np.einsum("iyx,jyx,yx->ij", [x, -y], [x, -y], weight)
    dx, dy = np.linalg.eigh(covariance)[1][:, -1]
    return float(np.degrees(np.arctan2(dy, dx)) % 180)


@pytest.mark.parametrize("degrees", range(0, 180, 15))
def test_glyphs__lie_along_the_edge(degrees: int):
    # Waves whose crests run at this angle above the horizontal.
    y, x = np.mgrid[:48, :48]
    angle = np.radians(degrees)
    waves = np.sin(0.7 * (x * np.sin(angle) + y * np.cos(angle)))
    hog = HOG(channels=1, bins=9, cell_px=16, patch_px=16)
    cells = hog.to_cells(hog(torch.from_numpy(waves)[None, None]), (3, 3))

    drawn = draw_glyphs(cells[:, 0].permute(0, 2, 3, 1).numpy(), long_side_px=96)

    found = main_axis(drawn[0, 32:64, 32:64, 0].astype(float))
    apart = abs((found - degrees + 90) % 180 - 90)
    assert apart <= 10.5  # half a bin


def test_glyphs__a_horizontal_edge_gives_a_horizontal_stroke():
    picture = torch.zeros(1, 1, 8, 8)
    picture[:, :, 4:] = 1
    cells = HOG(1, bins=9, cell_px=8, patch_px=8)(picture).reshape(1, 1, 1, 9)

    lit = np.argwhere(draw_glyphs(cells.numpy(), long_side_px=40)[0, :, :, 0] > 127)

    height, width = np.ptp(lit, axis=0)
    assert width > 30
    assert height < 12


def test_glyphs__brightness_is_the_weight_and_stays_in_range():
    brightest = [draw_glyphs(histogram(0, w)).max() for w in (-1.0, 0.0, 0.5, 1.0, 3.0)]

    assert brightest == [0, 0, 128, 255, 255]


def test_glyphs__of_a_wide_picture_fill_the_longer_side():
    drawn = draw_glyphs(np.ones((2, 3, 7, 9), dtype=np.float32), long_side_px=100)

    assert (drawn.shape, drawn.dtype) == ((2, 45, 105, 1), np.uint8)


def test_glyphs__stay_in_their_cell():
    histograms = np.zeros((1, 2, 3, 9), dtype=np.float32)
    histograms[0, 1, 2] = 1

    drawn = draw_glyphs(histograms, long_side_px=60)[0, :, :, 0]

    assert drawn[20:, 40:].any()
    drawn[20:, 40:] = 0
    assert not drawn.any()
