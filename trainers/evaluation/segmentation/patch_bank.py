"""Patches of labelled pictures, and the labels of other patches by the most similar of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mimray.trainers.models.full_precision import full_precision

# Sides of the matrices of similarities: 256 MiB each in fp32.
_QUERY_ROWS = 1024
_BANK_ROWS = 65_536


@dataclass(frozen=True)
class PatchBank:
    """Labelled patches to retrieve from.

    Attributes:
        features: float32 [M, D], of unit length.
        labels: float32 [M, K], shares of the classes, each row of sum 1.
    """

    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Number of patches, M."""
        return len(self.features)

    def posteriors(
        self, queries: Float[Tensor, "Q D"], *, k: int, temperature: float
    ) -> Float[Tensor, "Q K"]:
        """The k most similar patches' labels, averaged by weights exp(cosine / temperature).

        Args:
            queries: features of unit length, on the bank's device.
            k: number of neighbours, cut to the bank's size.
            temperature: smaller lets the nearest count for more.

        Source: Balažević et al. 2023, "Towards In-Context Scene Understanding" (Hummingbird),
            sec. 3.1: cross-attention over the nearest neighbours.
        """
        return torch.cat(
            [
                self._posteriors(rows, min(k, len(self)), temperature)
                for rows in torch.split(queries, _QUERY_ROWS)
            ]
        )

    def _posteriors(self, queries: Tensor, k: int, temperature: float) -> Tensor:
        similarity, index = nearest(queries, self.features, k)
        # Less the best one's, which changes no weight's share and cannot overflow.
        weights = ((similarity - similarity[:, :1]).double() / temperature).exp()
        weights = (weights / weights.sum(dim=1, keepdim=True)).float()
        return (weights.unsqueeze(2) * self.labels[index]).sum(dim=1)


def nearest(
    queries: Float[Tensor, "Q D"],
    bank: Float[Tensor, "M D"],
    k: int,
    *,
    bank_rows: int = _BANK_ROWS,
) -> tuple[Float[Tensor, "Q k"], Int64[Tensor, "Q k"]]:
    """The largest inner products with a bank and the places of their rows, largest first.

    Every row is compared. Memory is bounded by `bank_rows`, and no result depends on it but the
    choice among rows that are equally similar.

    Args:
        queries: rows to look up.
        bank: rows to be found.
        k: number of rows to find, at most M.
        bank_rows: rows compared at once.
    """
    best = queries.new_empty(len(queries), 0)
    places = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    with full_precision(queries):
        for start in range(0, len(bank), bank_rows):
            similarity = queries @ bank[start : start + bank_rows].T
            found, index = similarity.topk(min(k, similarity.shape[1]), dim=1)
            best = torch.cat([best, found], dim=1)
            places = torch.cat([places, index + start], dim=1)
            best, order = best.sort(dim=1, descending=True, stable=True)
            best, places = best[:, :k], places.gather(1, order[:, :k])
    return best, places


def patch_shares(
    mask: np.ndarray,
    grid: tuple[int, int],
    num_classes: int,
    ignore_index: int,
    min_labelled: float,
) -> tuple[np.ndarray, np.ndarray]:
    """The shares of the classes in each patch of a mask, void left out.

    Args:
        mask: int64 [H, W], classes or void.
        grid: (rows, columns) of patches, which divide H and W.
        num_classes: number of classes, K.
        ignore_index: the label of void pixels.
        min_labelled: least share of a patch's pixels that must not be void.

    Returns:
        The places of the patches with enough labelled pixels, int64 [P], in rows from the top left,
        and the shares of the classes in each, float32 [P, K].
    """
    rows, columns = grid
    height, width = mask.shape[0] // rows, mask.shape[1] // columns
    assert mask.shape == (rows * height, columns * width)
    down, across = np.arange(mask.shape[0]) // height, np.arange(mask.shape[1]) // width
    patch = down[:, None] * columns + across  # H W
    known = mask != ignore_index
    counts = np.bincount(
        patch[known] * num_classes + mask[known], minlength=rows * columns * num_classes
    ).reshape(-1, num_classes)
    labelled = counts.sum(axis=1)
    kept = np.flatnonzero((labelled > 0) & (labelled >= min_labelled * height * width))
    shares = (counts[kept] / labelled[kept, None]).astype(np.float32)
    return kept, shares
