"""Histograms of oriented gradients (HOG), the targets of MaskFeat.

Source: Dalal & Triggs 2005, as computed for Wei et al. 2022, sec. 3, by the official code
(facebookresearch/SlowFast, `HOGLayerC`): no Gaussian window, no blocks of cells.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class HOG(nn.Module):
    """HOG of pictures by patch, in fp32 and without gradient, on the pictures' device.

    The values of a patch are flattened as (channel, bin, cell row, cell column), the official
    order. Bin k holds edges whose gradient has an angle of [k, k + 1) * 180 / bins degrees from
    the vertical. There are no parameters or buffers, so no engine can cast them.

    Args:
        channels: channels of the pictures; each has its own histograms.
        bins: unsigned orientations over 180 degrees.
        cell_px: side of a cell, the square of one histogram, pixels.
        patch_px: side of a patch, pixels, a multiple of cell_px.

    Attributes:
        out_dim: values per patch, P = channels * bins * (patch_px / cell_px)^2.
    """

    def __init__(self, channels: int, bins: int, cell_px: int, patch_px: int) -> None:
        super().__init__()
        assert patch_px % cell_px == 0
        self.channels = channels
        self.bins = bins
        self.cell_px = cell_px
        self.cells_a_side = patch_px // cell_px
        self.out_dim = channels * bins * self.cells_a_side**2

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N P"]:
        """Histograms of whole pictures, each of Euclidean length 1, or 0 in a flat cell.

        Args:
            images: pictures normalised by mean and standard deviation, as the encoder gets them.
        """
        gx, gy = sobel(images.float())
        cells = orientation_histograms(gx, gy, self.bins, self.cell_px)  # B C K R S
        return self.to_patches(F.normalize(cells, dim=2))

    def to_patches(self, cells: Float[Tensor, "B C K R S"]) -> Float[Tensor, "B N P"]:
        """Gather the histograms of each patch, patches row-major."""
        b, c, k, rows, columns = cells.shape
        m = self.cells_a_side
        x = cells.reshape(b, c, k, rows // m, m, columns // m, m)  # B C K h m w m
        return x.permute(0, 3, 5, 1, 2, 4, 6).reshape(b, -1, self.out_dim)  # B (h w) (C K m m)

    def to_cells(
        self, patches: Float[Tensor, "B N P"], grid: tuple[int, int]
    ) -> Float[Tensor, "B C K R S"]:
        """The inverse of `to_patches` for a grid of (rows, columns) of patches."""
        (h, w), m = grid, self.cells_a_side
        x = patches.reshape(-1, h, w, self.channels, self.bins, m, m)  # B h w C K m m
        x = x.permute(0, 3, 4, 1, 5, 2, 6)  # B C K h m w m
        return x.reshape(-1, self.channels, self.bins, h * m, w * m)


def sobel(
    images: Float[Tensor, "B C H W"],
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
    """Sobel differences (left minus right, top minus bottom) per channel, mirrored at borders.

    Computed from slices, since a convolution may run in TF32 or bf16, and is slower on a CPU.
    """
    x = F.pad(images, (1, 1, 1, 1), mode="reflect")
    across = x[..., :-2] - x[..., 2:]  # B C H+2 W
    down = x[..., :-2, :] - x[..., 2:, :]  # B C H W+2
    gx = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
    gy = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
    return gx, gy


def orientation_histograms(
    gx: Float[Tensor, "B C H W"], gy: Float[Tensor, "B C H W"], bins: int, cell_px: int
) -> Float[Tensor, "B C K R S"]:
    """Sums of gradient magnitude by orientation, in cells that do not overlap.

    Each pixel votes for one bin of one cell; nothing is shared between neighbours.

    Args:
        gx: horizontal gradient.
        gy: vertical gradient.
        bins: number of bins K; the angle atan2(gx, gy) falls into bin floor(angle / pi * K) mod K.
        cell_px: side of a cell, pixels; divides H and W.
    """
    magnitude = torch.hypot(gx, gy)
    chosen = (torch.atan2(gx, gy) / math.pi * bins).floor().remainder(bins)
    # One pass per bin; a scatter's sums have no fixed order on a GPU, and take K times the memory.
    return torch.stack(
        [
            F.avg_pool2d(torch.where(chosen == k, magnitude, 0.0), cell_px, divisor_override=1)
            for k in range(bins)
        ],
        dim=2,
    )
