"""Patch tokens as colours: their first three principal components as red, green and blue."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

NUM_COLOURS = 3
_EDGES = (0.02, 0.98)  # quantiles of a component that get no and full colour


def principal_colours(
    reference: Float[Tensor, "B N D"], *others: Float[Tensor, "B N D"]
) -> list[np.ndarray]:
    """Tokens as colours by the first three principal components of the reference.

    Args:
        reference: the tokens that the components and the range of each colour are taken from.
        others: tokens of the same features to colour alike.

    Returns:
        uint8 [B, N, 3], of the reference and of each of the others.
    """
    tokens = [t.detach().double().cpu() for t in (reference, *others)]
    flat = tokens[0].flatten(0, 1)  # (B N) D
    centre, axes = flat.mean(dim=0), _principal_axes(flat)
    scores = [(t - centre) @ axes for t in tokens]  # B N 3
    low, high = _range(scores[0])
    return [_colours(s, low, high) for s in scores]


def aligned_colours(
    reference: Float[Tensor, "B N D"], other: Float[Tensor, "B N E"]
) -> list[np.ndarray]:
    """Tokens of two encoders as colours, each by its own components, of like hues for like places.

    Two encoders have no feature in common, and the order and the sign of components are arbitrary.
    The other's components are turned onto the reference's by orthogonal Procrustes, over all
    tokens.

    Args:
        reference: tokens of the encoder whose components remain as they are.
        other: tokens of the same places by another encoder.

    Returns:
        uint8 [B, N, 3], of the reference and of the other.

    Source: Schönemann 1966, "A Generalized Solution of the Orthogonal Procrustes Problem".
    """
    ours, theirs = (_scores(t.detach().double().cpu()) for t in (reference, other))
    left, _, right = torch.linalg.svd(theirs.flatten(0, 1).T @ ours.flatten(0, 1))
    return [_colours(scores, *_range(scores)) for scores in (ours, theirs @ left @ right)]


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


def _scores(tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N 3"]:
    """The first three principal components, centred."""
    flat = tokens.flatten(0, 1)
    return (tokens - flat.mean(dim=0)) @ _principal_axes(flat)


def _principal_axes(flat: Float[Tensor, "M D"]) -> Float[Tensor, "D 3"]:
    """Directions of the largest variance, the largest first; zeros beyond the D there are."""
    centred = flat - flat.mean(dim=0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -NUM_COLOURS:].flip(1)
    # An eigenvector's sign is arbitrary: its largest element is made positive.
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    return F.pad(axes, (0, NUM_COLOURS - axes.shape[1]))


def _range(scores: Float[Tensor, "B N 3"]) -> tuple[Tensor, Tensor]:
    edges = torch.tensor(_EDGES, dtype=torch.float64)
    low, high = torch.quantile(scores.flatten(0, 1), edges, dim=0)  # 3 each
    return low, high


def _colours(scores: Float[Tensor, "B N 3"], low: Tensor, high: Tensor) -> np.ndarray:
    shades = (scores - low) / (high - low).clamp_min(1e-12)
    coloured: np.ndarray = (255 * shades.clamp(0, 1)).round().byte().numpy()
    return coloured
