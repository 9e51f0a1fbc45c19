"""Confusion matrices, of pictures and of pixels alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

# Of more classes a matrix is mostly zeros, and grows with their square.
MOST_IN_A_MATRIX = 100


def confusion_matrix(
    labels: np.ndarray,
    predicted: np.ndarray,
    num_classes: int,
    ignore_index: int | None = None,
) -> np.ndarray:
    """Count by label (rows) and prediction (columns), int64 [K, K].

    Args:
        labels: int64, any shape; classes from 0.
        predicted: int64 of the same shape, in [0, K).
        num_classes: K.
        ignore_index: label of what is left out; None leaves out nothing.
    """
    known = labels != ignore_index if ignore_index is not None else np.full(labels.shape, True)
    pairs = labels[known] * num_classes + predicted[known]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def confusion_counts(
    labels: np.ndarray, predicted: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of label and prediction that occur, the most frequent first.

    Args:
        labels: int64 [N].
        predicted: int64 [N].

    Returns:
        Labels, predictions and numbers of pictures, each int64 [P].
    """
    pairs, counts = np.unique(np.stack([labels, predicted], axis=1), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return pairs[order, 0], pairs[order, 1], counts[order]


def confusion_record(
    labels: np.ndarray, predicted: np.ndarray, class_names: Sequence[str]
) -> dict[str, Any]:
    """A confusion matrix ready for JSON; of many classes, the pairs that occur.

    Args:
        labels: int64 [N], classes.
        predicted: int64 [N], classes.
        class_names: names of the classes, by label.
    """
    record: dict[str, Any] = {"class_names": list(class_names)}
    if len(class_names) <= MOST_IN_A_MATRIX:
        matrix = confusion_matrix(labels, predicted, len(class_names))
        return record | {"true_by_predicted": matrix.tolist()}
    columns = confusion_counts(labels, predicted)
    return record | {"true_predicted_count": np.stack(columns, axis=1).tolist()}
