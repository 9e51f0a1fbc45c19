"""Reductions of losses shared by several methods."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor


def masked_mean(
    error: Float[Tensor, "B N"],
    mask: Bool[Tensor, "B N"],
    hidden_mean: Float[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    """Mean over hidden patches, in fp32 at any precision of the model.

    Args:
        error: the error of each patch.
        mask: True = hidden.
        hidden_mean: as for `mean_over_hidden`.
    """
    return mean_over_hidden((error.float() * mask).sum(), mask, hidden_mean)


def mean_over_hidden(
    total: Float[Tensor, ""], mask: Bool[Tensor, "B N"], hidden_mean: Float[Tensor, ""] | None
) -> Float[Tensor, ""]:
    """A sum over a micro batch's hidden patches, divided by the number that it should have.

    Averaged over the micro batches of a step, as the engine does, the result is the mean over all
    hidden patches of the global batch, each with the same weight.

    Args:
        total: the sum.
        mask: True = hidden.
        hidden_mean: hidden patches of a picture, averaged over the global batch; None for the mean
            over this batch alone.
    """
    return total / (mask.sum() if hidden_mean is None else hidden_mean * len(mask))
