"""Trained heads of any task, loaded from their folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from mimray.trainers.errors import DataError
from mimray.trainers.evaluation.features.encoders import FeatureEncoder
from mimray.trainers.evaluation.heads.head_files import CARD

if TYPE_CHECKING:
    from mimray.trainers.evaluation.detection.detector import Detector
    from mimray.trainers.evaluation.probes.pooled_head import PooledHead
    from mimray.trainers.evaluation.segmentation.segmenter import Segmenter


def load_head(
    folder: str | Path, encoder: FeatureEncoder, device: str = "cpu"
) -> Segmenter | Detector | PooledHead:
    """Put a trained head on the encoder that it was trained on.

    Args:
        folder: folder of a trained head, as `mimray evaluate` leaves it, e.g.
            `runs/photos/evaluation/segmentation`.
        encoder: the same one, or an endpoint that serves it, on the device. A head that was
            trained together with its encoder brings that encoder's weights along.
        device: device of the head, as torch names it.

    Returns:
        For segmentation, called with pictures it gives the class of each pixel; for `linear` and
        `knn` the scores of the classes; for detection, `detect` gives boxes, classes and scores.

    Raises:
        DataError: there is no head, or it belongs to another encoder.
    """
    from mimray.trainers.evaluation.detection import detector
    from mimray.trainers.evaluation.probes import pooled_head
    from mimray.trainers.evaluation.segmentation import segmenter

    folder = Path(folder)
    try:
        task = json.loads((folder / CARD).read_text())["task"]
    except FileNotFoundError:
        raise DataError(
            f"{folder} holds no {CARD}", hint="`mimray evaluate --task segmentation` writes one"
        ) from None
    if task == "segmentation":
        return segmenter.load_head(folder, encoder, device)
    if task == "detection":
        return detector.load_head(folder, encoder, device)
    return pooled_head.load_head(folder, task, encoder, device)
