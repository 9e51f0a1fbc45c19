"""Confusion matrices, of pictures and of pixels alike."""

from __future__ import annotations

import numpy as np


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
