"""Scoring of any segmenter on labelled pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from mimray.trainers.evaluation.annotations.base import SegmentationSet
from mimray.trainers.evaluation.score import Progress
from mimray.trainers.evaluation.segmentation.metrics import PixelCounts
from mimray.trainers.evaluation.segmentation.pictures import Shown

_NUM_SHOWN = 6

Segment = Callable[[Sequence[Image.Image], int], list[np.ndarray]]
"""From upright pictures and windows encoded at once to the class of each pixel, int64 [h, w]."""


def score_pictures(
    segment: Segment, val: SegmentationSet, batch_size: int, progress: Progress
) -> tuple[PixelCounts, list[Shown]]:
    """Segment pictures and count the pixels.

    Args:
        segment: the segmenter.
        val: pictures to score on.
        batch_size: pictures, and windows, at once.
        progress: called with the number of pictures scored.

    Returns:
        The pixels counted by picture, and a few pictures spread over the set.
    """
    by_picture = PixelCounts(len(val.class_names))
    to_show = set(np.linspace(0, len(val) - 1, min(_NUM_SHOWN, len(val))).astype(int).tolist())
    shown = []
    for start in range(0, len(val), batch_size):
        indices = range(start, min(start + batch_size, len(val)))
        examples = [val[index] for index in indices]
        found = segment([image for image, _ in examples], batch_size)
        for index, (image, mask), classes in zip(indices, examples, found, strict=True):
            by_picture.add(mask, classes, val.ignore_index)
            if index in to_show:
                void = mask == val.ignore_index
                shown.append(Shown(np.asarray(image), mask, void, classes))
        progress("scoring", indices.stop, len(val))
    return by_picture, shown


def missing_classes(
    confusion: np.ndarray, train: SegmentationSet, val: SegmentationSet
) -> tuple[str, ...]:
    """Notes that name the classes without a labelled pixel to score on.

    Args:
        confusion: int64 [K, K] over all pictures, labels by predictions.
        train: pictures learnt from.
        val: pictures scored on.
    """
    labelled, predicted = confusion.sum(axis=1) > 0, confusion.sum(axis=0) > 0
    void = train.ignore_index, val.ignore_index
    unlabelled = np.flatnonzero(~labelled).tolist()
    names = {
        "left out of the means": [
            train.class_names[k] for k in unlabelled if not predicted[k] and k not in void
        ],
        "predicted all the same, which counts as 0 in mIoU and not in mIoU_labelled": [
            train.class_names[k] for k in unlabelled if predicted[k]
        ],
    }
    return tuple(
        f"classes without a labelled pixel to score on, {what}: {', '.join(those)}"
        for what, those in names.items()
        if those
    )
