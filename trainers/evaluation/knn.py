"""Nearest neighbours on frozen features: the first question to ask of a representation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

NEIGHBOURS = (1, 5, 10, 20, 200)
HEADLINE_K = 20
_CHUNK_ROWS = 1024


@dataclass(frozen=True)
class KnnScore:
    """Accuracies of a nearest-neighbour classifier.

    Attributes:
        headline: accuracy at k = 20, or at the size of the training set where that is smaller.
        k: the headline's k.
        accuracy: by k, shares of the held-out pictures in [0, 1].
        num_train: pictures voted with.
        num_val: pictures classified.
    """

    headline: float
    k: int
    accuracy: dict[int, float]
    num_train: int
    num_val: int


def knn(
    train_x: np.ndarray,
    train_y: np.ndarray,
    val_x: np.ndarray,
    val_y: np.ndarray,
    *,
    k: int = HEADLINE_K,
    temperature: float = 0.07,
) -> KnnScore:
    """Classify by the k most similar training pictures, each voting exp(cosine / temperature).

    All of k = 1, 5, 10, 20, 200 and the one asked for are scored at once; one beyond the number
    of training pictures is cut to that number.

    Args:
        train_x: float [N, D], features to vote with; lengths do not matter.
        train_y: int [N], their labels.
        val_x: float [M, D], features to classify.
        val_y: int [M], their labels.
        k: the headline's k.
        temperature: smaller lets the nearest count for more.

    Source: Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance
    Discrimination", sec. 3.4; temperature and k as there and in Caron et al. 2021 (DINO).
    """
    predicted = predict(train_x, train_y, val_x, ks=(*NEIGHBOURS, k), temperature=temperature)
    accuracy = {n: float((labels == val_y).mean()) for n, labels in predicted.items()}
    k = min(k, len(train_x))
    return KnnScore(accuracy[k], k, accuracy, num_train=len(train_x), num_val=len(val_x))


def predict(
    train_x: np.ndarray,
    train_y: np.ndarray,
    val_x: np.ndarray,
    *,
    ks: tuple[int, ...],
    temperature: float = 0.07,
) -> dict[int, np.ndarray]:
    """Predicted labels, int64 [M], by k; arguments are those of `knn`.

    On a tie the smallest label wins.
    """
    assert len(train_x) == len(train_y) > 0
    ks = tuple(sorted({min(k, len(train_x)) for k in ks}))
    classes, votes_for = np.unique(train_y, return_inverse=True)
    bank = F.normalize(torch.from_numpy(np.asarray(train_x, np.float32)), dim=1)
    queries = F.normalize(torch.from_numpy(np.asarray(val_x, np.float32)), dim=1)
    kinds = torch.from_numpy(votes_for)
    found: dict[int, list[np.ndarray]] = {k: [] for k in ks}
    for rows in torch.split(queries, _CHUNK_ROWS):
        similarity, nearest = (rows @ bank.T).topk(ks[-1], dim=1)  # R K, best first
        # Less the best one's, which changes no vote's rank and cannot overflow.
        weight = ((similarity - similarity[:, :1]).double() / temperature).exp()
        neighbours = kinds[nearest]  # R K
        votes = torch.zeros(len(rows), len(classes), dtype=torch.float64)
        counted = 0
        for k in ks:
            part = slice(counted, k)
            votes.scatter_add_(1, neighbours[:, part], weight[:, part])
            found[k].append(classes[votes.argmax(dim=1).numpy()])
            counted = k
    return {k: np.concatenate(parts) for k, parts in found.items()}
