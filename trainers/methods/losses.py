"""Reductions that several methods share."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor


def masked_mean(error: Float[Tensor, "B N"], mask: Bool[Tensor, "B N"]) -> Float[Tensor, ""]:
    """Mean over the hidden patches of a batch, in fp32 whatever the model computes in.

    Args:
        error: a value a patch.
        mask: True = hidden.
    """
    return (error.float() * mask).sum() / mask.sum()
