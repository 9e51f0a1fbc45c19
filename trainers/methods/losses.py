"""Reductions of losses shared by several methods."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor


def masked_mean(error: Float[Tensor, "B N"], mask: Bool[Tensor, "B N"]) -> Float[Tensor, ""]:
    """Mean over the hidden patches of a batch, in fp32 at any precision of the model.

    Args:
        error: the error of each patch.
        mask: True = hidden.
    """
    return (error.float() * mask).sum() / mask.sum()
