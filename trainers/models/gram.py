"""The Gram loss: patches keep the similarities to each other that another encoder gives them."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mimray.trainers.models.full_precision import full_precision


def gram_loss(
    tokens: Float[Tensor, "B N D"], reference: Float[Tensor, "B N E"]
) -> Float[Tensor, ""]:
    """Mean squared difference of two Gram matrices of each picture, in fp32.

    A Gram matrix [N, N] holds the cosines between all patches of one picture. Features may thus
    turn in their space, or have another width, and cost nothing: what counts is which patches are
    alike.

    Args:
        tokens: patch tokens that are trained.
        reference: tokens of the same patches by another encoder.

    Source: Siméoni et al. 2025, "DINOv3", sec. 4.2; the mean over entries in place of their sum,
    the similarities in fp32 and by picture, as in its published code.
    """
    with full_precision(tokens):
        return F.mse_loss(_gram(tokens), _gram(reference))


def _gram(tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N N"]:
    directions = F.normalize(tokens.float(), dim=-1)
    return directions @ directions.transpose(1, 2)
