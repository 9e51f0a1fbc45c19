"""Metrics of a segmentation, from a confusion matrix of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def scores(confusion: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """IoU and accuracy over a whole validation set, in [0, 1].

    A class without a labelled pixel has no IoU and no accuracy: None, and it is left out of both
    means. Pixels that were wrongly given such a class count against their own.

    Args:
        confusion: int64 [K, K], labels by predictions.
        class_names: names of the K classes.

    Returns:
        `mIoU`, `pixel_accuracy`, `mean_accuracy`, and by class name `IoU` and `accuracy`.

    Source: Long et al. 2015, "Fully Convolutional Networks for Semantic Segmentation", sec. 5,
        whose means are over the classes that there are.
    """
    hits = confusion.diagonal().astype(np.float64)
    labelled, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    there = labelled > 0
    iou = hits[there] / (labelled + predicted - hits)[there]
    accuracy = hits[there] / labelled[there]
    return {
        "mIoU": float(iou.mean()),
        "pixel_accuracy": float(hits.sum() / labelled.sum()),
        "mean_accuracy": float(accuracy.mean()),
        "IoU": _by_name(iou, there, class_names),
        "accuracy": _by_name(accuracy, there, class_names),
    }


def _by_name(
    values: np.ndarray, there: np.ndarray, class_names: Sequence[str]
) -> dict[str, float | None]:
    found: dict[str, float | None] = dict.fromkeys(class_names)
    for value, number in zip(values, np.flatnonzero(there).tolist(), strict=True):
        found[class_names[number]] = float(value)
    return found
