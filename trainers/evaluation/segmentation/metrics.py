"""Metrics of a segmentation, from a confusion matrix of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mimray.trainers.evaluation.confusion import confusion_matrix


class PixelCounts:
    """Pixels counted picture by picture, as far as a resample of the pictures needs them.

    Args:
        num_classes: number of classes, K.

    Attributes:
        confusion: int64 [K, K] over all pictures, labels by predictions.
    """

    def __init__(self, num_classes: int) -> None:
        self.confusion = np.zeros((num_classes, num_classes), np.int64)
        # Of each picture: hits, labelled and predicted pixels by class, all that an IoU takes.
        self._counts: list[np.ndarray] = []

    def add(self, mask: np.ndarray, predicted: np.ndarray, ignore_index: int) -> None:
        """Count a picture.

        Args:
            mask: int64 [H, W], labels.
            predicted: int64 [H, W], classes.
            ignore_index: the label of void pixels.
        """
        found = confusion_matrix(mask, predicted, len(self.confusion), ignore_index)
        self.confusion += found
        self._counts.append(np.stack([found.diagonal(), found.sum(axis=1), found.sum(axis=0)]))

    def miou(self, counts: np.ndarray) -> float | None:
        """`mIoU` of `scores` where each picture counts so many times; None without any pixel.

        Args:
            counts: int64 [N], one for each picture in the order added.
        """
        hits, labelled, predicted = np.tensordot(counts, np.stack(self._counts), axes=1)  # K
        union = labelled + predicted - hits
        somewhere = union > 0
        return float((hits[somewhere] / union[somewhere]).mean()) if somewhere.any() else None


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
