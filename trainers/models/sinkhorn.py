"""Sinkhorn's algorithm: assignments of vectors to prototypes that use all prototypes alike."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mimray.trainers.models.full_precision import full_precision


@torch.no_grad()
def sinkhorn(
    scores: Float[Tensor, "*G M K"], temperature: float, rounds: int = 3
) -> Float[Tensor, "*G M K"]:
    """Balance assignments over the vectors of each group, in fp32 whatever autocast says.

    Each round scales the columns to the same sum, so that a group's vectors are shared out evenly
    among the prototypes, and then the rows to one. Groups are independent of each other: with one
    group for each place of a picture, no place can be a prototype.

    Args:
        scores: similarities of M vectors to K prototypes, in G groups.
        temperature: divisor of the scores; the lower, the nearer to one prototype a vector.
        rounds: times that columns and rows are scaled.

    Returns:
        Assignments, whose rows sum to one.

    Sources: Caron et al. 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster
    Assignments", sec. 3.1; by place, Darcet et al. 2025, "Cluster and Predict Latent Patches for
    Improved Masked Image Modeling", sec. 3.2.
    """
    with full_precision(scores):
        # In logarithms nothing overflows, and a prototype that is far from all keeps its share.
        log_q = scores.float() / temperature
        for _ in range(rounds):
            log_q = log_q - log_q.logsumexp(dim=-2, keepdim=True)
            log_q = log_q - log_q.logsumexp(dim=-1, keepdim=True)
        return log_q.exp()
