"""Fixed position embeddings."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def sincos_2d(width: int, grid: tuple[int, int], num_prefix: int = 0) -> Float[Tensor, "N D"]:
    """Sine-cosine position embeddings of a grid, row-major.

    The first half of the channels encodes the column, the second half the row; each half is
    sines then cosines at frequencies 10000^(-2i/(D/2)). Prefix tokens get zeros.

    Args:
        width: token width D, a multiple of 4.
        grid: (rows, columns) of patches.
        num_prefix: number of prefix tokens, which come first.

    Returns:
        float32 [num_prefix + rows * columns, D].

    Source: Vaswani et al. 2017, sec. 3.5, in two dimensions as in the official MAE code.
    """
    assert width % 4 == 0
    rows, columns = grid
    # In float64, as in the published code, so that float32 results agree to the digit.
    frequency = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4))
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    halves = []
    for position in (column, row):  # the column goes first
        angle = position.reshape(-1, 1) * frequency  # N, D/4
        halves += [np.sin(angle), np.cos(angle)]
    table = np.concatenate(halves, axis=1)
    table = np.concatenate([np.zeros((num_prefix, width)), table])
    return torch.from_numpy(table).float()
