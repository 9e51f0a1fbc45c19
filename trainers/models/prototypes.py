"""Prototypes: the last layer of heads that sort vectors into clusters by their direction."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class Prototypes(nn.Module):
    """Scores of vectors against K prototypes: cosines, times a gain of each prototype.

    Vectors are normalised, and a linear layer without bias follows whose rows are a direction and a
    length (weight normalisation), so that a prototype cannot win by its length.

    Args:
        width: width of the vectors D.
        num_prototypes: number of prototypes K.
        trains_gain: True if the gains are trained; else they are one, and scores lie in [-1, 1].

    Sources: Caron et al. 2021 (DINO), appendix C, and its official code (`DINOHead`), whose
    `norm_last_layer` is the opposite of `trains_gain`; Salimans & Kingma 2016, "Weight
    Normalization", eq. 2.
    """

    def __init__(self, width: int, num_prototypes: int, *, trains_gain: bool) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.empty(num_prototypes, width))
        nn.init.trunc_normal_(self.direction, std=0.02)
        # Two dimensions, as published: so it decays.
        self.gain = nn.Parameter(torch.ones(num_prototypes, 1)) if trains_gain else None

    def forward(self, vectors: Float[Tensor, "*B D"]) -> Float[Tensor, "*B K"]:
        """Score vectors; norms are computed in fp32, the product in the vectors' precision."""
        weight = F.normalize(self.direction.float(), dim=-1)  # K D
        if self.gain is not None:
            weight = weight * self.gain.float()
        directions = F.normalize(vectors.float(), dim=-1)
        return F.linear(directions.to(vectors.dtype), weight.to(vectors.dtype))
