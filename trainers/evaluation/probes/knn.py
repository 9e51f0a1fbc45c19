"""The nearest-neighbour probe: a vote of the training pictures with the most similar features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor
from torch.nn import functional as F

from mimray.trainers.config.evaluation.knn import KnnConfig
from mimray.trainers.data.decode import decode
from mimray.trainers.data.selection import evenly_spread
from mimray.trainers.data.sources import Source
from mimray.trainers.data.transforms import to_array, view_of
from mimray.trainers.evaluation.features.encoders import EncoderRef
from mimray.trainers.evaluation.features.pooled import ProbeData, load_probe_data
from mimray.trainers.evaluation.heads.head_files import head_files
from mimray.trainers.evaluation.probes.classification import (
    accuracy_of,
    described_view,
    missing_classes,
    per_class_accuracy,
)
from mimray.trainers.evaluation.score import Score, Setting
from mimray.trainers.evaluation.uncertainty import of_accuracy
from mimray.trainers.pictures import panel_sheet, png
from mimray.trainers.types import Panel

NEIGHBOURS = (1, 5, 10, 20, 200)
HEADLINE_K = 20
_CHUNK_ROWS = 1024
KEPT_BANK_BYTES = 256 << 20
"""Largest bank that is kept as a head."""

_NUM_QUERIES, _NUM_SHOWN = 8, 5
_CELL_PX, _FRAME_PX = 128, 8
_RIGHT, _WRONG = (46, 160, 67), (207, 34, 46)


@dataclass(frozen=True)
class KnnScore:
    """Accuracies of a nearest-neighbour classifier.

    Attributes:
        headline: accuracy at k = 20, or at the size of the training set where that is smaller.
        k: the headline's k.
        accuracy: share of the held-out pictures that are classified right, by k.
        num_train: pictures voted with.
        num_val: pictures classified.
        predicted: int64 [M], labels by the headline's k.
    """

    headline: float
    k: int
    accuracy: dict[int, float]
    predicted: np.ndarray
    num_train: int
    num_val: int


def evaluate(ref: EncoderRef, setting: Setting, config: KnnConfig) -> Score:
    """Score an encoder by its nearest neighbours; learns nothing.

    Args:
        ref: the encoder.
        setting: the data and what every task is told.
        config: the headline's k, temperature, pooling.

    Returns:
        Accuracy, by k and by class, and a sheet of queries with their neighbours.

    Raises:
        DataError: labels, classes or pictures that cannot be used.
        ConfigError: the encoder has no class token to pool by.
    """
    found = load_probe_data(ref, setting, config.pooling, config.view)
    card = ref.card()
    train, val = found.train, found.val
    setting.progress("neighbours", 0, len(val.x))
    score = knn(train.x, train.y, val.x, val.y, k=config.k, temperature=config.temperature)
    setting.progress("neighbours", len(val.x), len(val.x))
    per_class = per_class_accuracy(score.predicted, val.y, found.splits.class_names)
    return Score(
        metric=accuracy_of(config.view),
        headline=score.headline,
        metrics={
            accuracy_of(config.view): score.headline,
            "k": score.k,
            "accuracy_by_k": {str(k): accuracy for k, accuracy in score.accuracy.items()},
            "per_class_accuracy": per_class,
            "pooling": found.pooling,
            "view": described_view(config.view, card.interpolation, card.image_size),
        },
        data_fingerprint=found.splits.train.facts.fingerprint,
        val_fingerprint=found.splits.val.facts.fingerprint,
        num_train=score.num_train,
        num_val=score.num_val,
        evidence=of_accuracy(
            score.predicted == val.y, found.splits.val.facts.fingerprint, val.index
        ),
        notes=(*missing_classes(per_class), *found.notes),
        hold_out=found.splits.hold_out,
        pictures={"knn.png": _sheet(found, score.predicted)},
        files=_files(ref, found, config),
    )


def _files(ref: EncoderRef, found: ProbeData, config: KnnConfig) -> dict[str, bytes]:
    """The bank as files of a head; none where it is large."""
    train = found.train
    if train.x.nbytes > KEPT_BANK_BYTES:
        return {}
    bank = F.normalize(torch.from_numpy(train.x), dim=1)
    return head_files(
        "knn",
        {"bank": bank, "labels": torch.from_numpy(train.y)},
        ref.head_card(),
        config.model_copy(update={"pooling": found.pooling}),
        found.splits.learnt_names,
    )


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
    return KnnScore(
        accuracy[k], k, accuracy, predicted[k], num_train=len(train_x), num_val=len(val_x)
    )


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
        for k, votes in _votes(rows, bank, kinds, len(classes), ks, temperature):
            found[k].append(classes[votes.argmax(dim=1).numpy()])
    return {k: np.concatenate(parts) for k, parts in found.items()}


def vote_shares(
    bank: Tensor, labels: Tensor, queries: Tensor, num_classes: int, *, k: int, temperature: float
) -> Tensor:
    """The share of each class in the votes on queries, float64 [M, C].

    Args:
        bank: float32 [N, D], features to vote with, of length 1.
        labels: int64 [N], their labels.
        queries: float32 [M, D], features to classify; lengths do not matter.
        num_classes: C.
        k: neighbours that vote.
        temperature: smaller lets the nearest count for more.
    """
    ks = (min(k, len(bank)),)
    rows = F.normalize(queries, dim=1)
    ((_, votes),) = _votes(rows, bank, labels, num_classes, ks, temperature)
    return votes / votes.sum(dim=1, keepdim=True)


def _votes(
    rows: Tensor,
    bank: Tensor,
    labels: Tensor,
    num_classes: int,
    ks: tuple[int, ...],
    temperature: float,
) -> Iterator[tuple[int, Tensor]]:
    """Votes float64 [R, C] on rows [R, D] by each rising k; one tensor is filled from k to k."""
    similarity, nearest = (rows @ bank.T).topk(ks[-1], dim=1)  # R K, best first
    # Less the best one's, which changes no vote's rank and cannot overflow.
    weight = ((similarity - similarity[:, :1]).double() / temperature).exp()
    neighbours = labels[nearest]  # R K
    votes = torch.zeros(len(rows), num_classes, dtype=torch.float64, device=rows.device)
    counted = 0
    for k in ks:
        part = slice(counted, k)
        votes.scatter_add_(1, neighbours[:, part], weight[:, part])
        yield k, votes
        counted = k


def nearest(train_x: np.ndarray, val_x: np.ndarray, count: int) -> np.ndarray:
    """The most similar training pictures, int64 [M, count], best first."""
    bank = F.normalize(torch.from_numpy(train_x), dim=1)
    queries = F.normalize(torch.from_numpy(val_x), dim=1)
    return (queries @ bank.T).topk(min(count, len(bank)), dim=1).indices.numpy()


def _sheet(found: ProbeData, predicted: np.ndarray) -> bytes:
    """Some queries, evenly spread, each beside its neighbours, framed by right or wrong."""
    train, val, names = found.train, found.val, found.splits.class_names
    queries = evenly_spread(len(val.x), _NUM_QUERIES)
    neighbours = nearest(train.x, val.x[queries], _NUM_SHOWN)  # Q K
    columns = [_cells(found.splits.val, val.index[queries])]
    for rows in neighbours.T:
        columns.append(
            _cells(found.splits.train, train.index[rows], train.y[rows] == val.y[queries])
        )
    titles = ["query", *(f"nearest {n + 1}" for n in range(neighbours.shape[1]))]
    captions = [f"{names[val.y[q]]}; the vote says {names[predicted[q]]}" for q in queries]
    panels = [Panel(title, cells) for title, cells in zip(titles, columns, strict=True)]
    return png(panel_sheet(panels, captions=captions, scale=1))


def _cells(source: Source, indices: np.ndarray, right: Sequence[bool] | None = None) -> np.ndarray:
    """Pictures in equal squares, uint8 [B, H, W, 3]; framed where they are right or wrong."""
    cells = []
    for place, index in enumerate(indices):
        inner = _CELL_PX - 2 * _FRAME_PX
        picture = view_of(decode(source[int(index)].image).image, (inner, inner), "bicubic")
        colour = (255, 255, 255) if right is None else _RIGHT if right[place] else _WRONG
        cells.append(to_array(ImageOps.expand(picture, _FRAME_PX, colour)).transpose(1, 2, 0))
    return np.stack(cells)
