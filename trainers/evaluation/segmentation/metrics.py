"""Metrics of a segmentation, from a confusion matrix of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def scores(confusion: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """IoU and accuracy over a whole validation set, in [0, 1].

    `mIoU` is the mean over classes that are labelled or predicted somewhere, as mmsegmentation and
    torchmetrics count: a class that is predicted and has no labelled pixel has IoU 0.
    `mIoU_labelled` is the mean over labelled classes alone. The two differ where a validation set
    lacks classes of the training set. A class that is neither has no IoU: None.

    Args:
        confusion: int64 [K, K], labels by predictions.
        class_names: names of the K classes.

    Returns:
        `mIoU`, `mIoU_labelled`, `pixel_accuracy`, `mean_accuracy` (over labelled classes), and by
        class name `IoU` and `accuracy`.

    Source: mmsegmentation, `mmseg/evaluation/metrics/iou_metric.py` (intersection over union by
        class, `nanmean`); Long et al. 2015, "Fully Convolutional Networks for Semantic
        Segmentation", sec. 5.
    """
    hits = confusion.diagonal().astype(np.float64)
    labelled, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    union = labelled + predicted - hits
    there, somewhere = labelled > 0, union > 0
    iou = hits[somewhere] / union[somewhere]
    accuracy = hits[there] / labelled[there]
    return {
        "mIoU": float(iou.mean()),
        "mIoU_labelled": float(iou[there[somewhere]].mean()),
        "pixel_accuracy": float(hits.sum() / labelled.sum()),
        "mean_accuracy": float(accuracy.mean()),
        "IoU": _by_name(iou, somewhere, class_names),
        "accuracy": _by_name(accuracy, there, class_names),
    }


def _by_name(
    values: np.ndarray, there: np.ndarray, class_names: Sequence[str]
) -> dict[str, float | None]:
    found: dict[str, float | None] = dict.fromkeys(class_names)
    for value, number in zip(values, np.flatnonzero(there).tolist(), strict=True):
        found[class_names[number]] = float(value)
    return found
