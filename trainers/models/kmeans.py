"""Nearest codes, and k-means, from which a codebook may start."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from mimray.trainers.models.full_precision import full_precision

# Distances held at once: 64 MiB of fp32, for any number of vectors.
DISTANCES_AT_ONCE = 1 << 24


class Clusters(NamedTuple):
    """Counts and sums of the vectors of each code.

    Attributes:
        counts: float [K], the number of vectors of each code.
        sums: float [K, D], the sum of the vectors of each code.
    """

    counts: Tensor
    sums: Tensor


def nearest_codes(
    vectors: Float[Tensor, "M D"], table: Float[Tensor, "K D"]
) -> Int64[Tensor, " M"]:
    """The code nearest to each vector in Euclidean distance; the first of equals.

    Args:
        vectors: the vectors, in fp32.
        table: the codes' vectors, in fp32.
    """
    # |z - e|^2 / 2 without |z|^2 / 2, which is the same for all codes.
    halves = 0.5 * table.square().sum(dim=1)  # K
    rows = max(1, DISTANCES_AT_ONCE // len(table))
    with full_precision(vectors):
        found = [(halves - part @ table.T).argmin(dim=1) for part in torch.split(vectors, rows)]
    return torch.cat(found)


def cluster(vectors: Float[Tensor, "M D"], codes: Int64[Tensor, " M"], num_codes: int) -> Clusters:
    """Counts and sums of the vectors of each code, in fp32."""
    counts = torch.bincount(codes, minlength=num_codes).float()
    sums = vectors.new_zeros(num_codes, vectors.shape[1]).index_add_(0, codes, vectors)
    return Clusters(counts, sums)


def kmeans(
    vectors: Float[Tensor, "M D"],
    start: Float[Tensor, "K D"],
    *,
    iterations: int = 10,
    spherical: bool = False,
) -> Float[Tensor, "K D"]:
    """K-means by Lloyd's algorithm; a mean without vectors is not moved.

    Args:
        vectors: the vectors, in fp32; of length 1 if spherical.
        start: the initial means.
        iterations: number of rounds of assignment and averaging.
        spherical: True to keep the means on the unit sphere.

    Returns:
        The means.

    Source: Lloyd 1982; spherical: Dhillon & Modha 2001, sec. 3.
    """
    means = start
    for _ in range(iterations):
        counts, sums = cluster(vectors, nearest_codes(vectors, means), len(means))
        moved = sums / counts.clamp(min=1).unsqueeze(1)
        if spherical:
            moved = F.normalize(moved, dim=1)
        means = torch.where(counts.unsqueeze(1) > 0, moved, means)
    return means
