"""Tokens in false colours, for pictures of what features tell apart."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def principal_colours(
    reference: Float[Tensor, "B N D"], *others: Float[Tensor, "B N D"]
) -> list[np.ndarray]:
    """Tokens as colours by the first three principal components of the reference.

    Args:
        reference: the tokens that the components and the range of each colour are taken from.
        others: tokens to colour alike.

    Returns:
        uint8 [B, N, 3], of the reference and of each of the others.
    """
    tokens = [t.detach().double().cpu() for t in (reference, *others)]
    flat = tokens[0].flatten(0, 1)  # (B N) D
    centre = flat.mean(dim=0)
    axes = torch.linalg.eigh((flat - centre).T @ (flat - centre)).eigenvectors[:, -3:].flip(1)
    # An eigenvector's sign is arbitrary: its largest element is made positive.
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    scores = [(t - centre) @ axes for t in tokens]  # B N 3
    edges = torch.tensor([0.02, 0.98], dtype=torch.float64)
    low, high = torch.quantile(scores[0].flatten(0, 1), edges, dim=0)  # 3 each
    shades = [(s - low) / (high - low).clamp_min(1e-12) for s in scores]
    coloured = [F.pad(s, (0, 3 - s.shape[-1])) for s in shades]  # of two channels, say
    return [(255 * s.clamp(0, 1)).round().byte().numpy() for s in coloured]


def enlarged(colours: np.ndarray, grid: tuple[int, int], stride: int) -> np.ndarray:
    """Colours of tokens as pictures, each token a square.

    Args:
        colours: uint8 [B, N, 3], row-major over the grid.
        grid: (rows, columns) of tokens.
        stride: side of a square, pixels.

    Returns:
        uint8 [B, rows x stride, columns x stride, 3].
    """
    shades = colours.reshape(-1, *grid, 3)
    return shades.repeat(stride, axis=1).repeat(stride, axis=2)
