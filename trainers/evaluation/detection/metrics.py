"""COCO's figures for detections: average precision and recall."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mimray.trainers.data.geometry import Size
from mimray.trainers.evaluation.annotations.base import DetectionExample
from mimray.trainers.evaluation.detection.detector import Detections

Overlap = Literal["bbox", "segm"]

_SIZES = {"s": "small", "m": "medium", "l": "large"}
_IOU50, _IOU75 = 0, 5  # of COCO's thresholds .50, .55, …, .95


@dataclass(frozen=True)
class GroundTruth:
    """Labelled objects of a picture.

    Attributes:
        size: (height, width), pixels.
        boxes: float64 [N, 4], (left, top, right, bottom).
        labels: int64 [N], classes from 0.
        crowd: bool [N].
        areas: float64 [N], pixels, which say whether an object is small, medium or large.
        masks: COCO run lengths; None without masks.
    """

    size: Size
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    masks: list[dict[str, Any]] | None

    @classmethod
    def of(cls, example: DetectionExample, labels: np.ndarray) -> GroundTruth:
        """The labelled objects of an example.

        Args:
            example: picture and objects.
            labels: int64 [N], the objects' classes as the detector counts them.
        """
        from faster_coco_eval.core import mask as mask_api

        masks = None
        if example.masks is not None:
            masks = [mask_api.encode(np.asfortranarray(m.astype(np.uint8))) for m in example.masks]
        size = example.image.height, example.image.width
        return cls(size, example.boxes, labels, example.crowd, example.areas, masks)


@dataclass(frozen=True)
class Figures:
    """COCO's figures, by boxes or by masks.

    Attributes:
        values: `AP` (mean over IoU .50 to .95), `AP50`, `AP75`, `APs`, `APm`, `APl` (objects
            under 32 x 32, under 96 x 96, and larger, pixels), `AR1`, `AR10`, `AR<most>` (recall
            with so many found a picture), `ARs`, `ARm`, `ARl`. None where there is no such object.
        per_class: `AP` and `AP50` of each class; None for a class of which there is no object,
            which enters no mean.
        curves: float64 [K, 101], precision at IoU .50 by recall 0, .01, …, 1; NaN likewise.
    """

    values: dict[str, float | None]
    per_class: dict[str, dict[str, float | None]]
    curves: np.ndarray

    def as_json(self) -> dict[str, Any]:
        """Figures without the curves."""
        return {**self.values, "per_class": self.per_class}


def coco_figures(
    truths: Sequence[GroundTruth],
    found: Sequence[Detections],
    class_names: Sequence[str],
    *,
    by: Overlap,
    max_detections: int = 100,
) -> Figures:
    """Average precision and recall of detections, as COCO computes them.

    Args:
        truths: labelled objects, a picture each.
        found: objects found on the same pictures.
        class_names: names of the classes, by label.
        by: overlap of boxes, or of masks, which both sides must then have.
        max_detections: number of objects a picture that count, the best first.

    Source: https://cocodataset.org/#detection-eval, by faster-coco-eval.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    wanted = COCO(_ground_truth(truths, class_names))
    scored = COCOeval_faster(wanted, wanted.loadRes(_results(found, by)), by)
    scored.params.maxDets = sorted({1, min(10, max_detections), max_detections})
    scored.evaluate()
    scored.accumulate()
    # T thresholds, R recalls, K classes, A sizes (all, small, medium, large), M most a picture
    precision, recall = scored.eval["precision"], scored.eval["recall"]  # T R K A M, T K A M
    most = scored.params.maxDets
    values = {
        "AP": _mean(precision[:, :, :, 0, -1]),
        "AP50": _mean(precision[_IOU50, :, :, 0, -1]),
        "AP75": _mean(precision[_IOU75, :, :, 0, -1]),
        **{
            f"AP{letter}": _mean(precision[:, :, :, size, -1])
            for size, letter in enumerate(_SIZES, start=1)
        },
        **{f"AR{count}": _mean(recall[:, :, 0, place]) for place, count in enumerate(most)},
        **{f"AR{letter}": _mean(recall[:, :, s, -1]) for s, letter in enumerate(_SIZES, start=1)},
    }
    per_class = {
        name: {
            "AP": _mean(precision[:, :, label, 0, -1]),
            "AP50": _mean(precision[_IOU50, :, label, 0, -1]),
        }
        for label, name in enumerate(class_names)
    }
    curves = precision[_IOU50, :, :, 0, -1].T.astype(np.float64)  # K R
    return Figures(values, per_class, np.where(curves < 0, np.nan, curves))


def resampled_ap(
    truths: Sequence[GroundTruth],
    found: Sequence[Detections],
    class_names: Sequence[str],
    *,
    max_detections: int = 100,
) -> Callable[[np.ndarray], float | None]:
    """AP by boxes as a function of the times that each picture counts.

    Objects are matched once; only the curves are made again for each resample.

    Args:
        truths: labelled objects, a picture each.
        found: objects found on the same pictures.
        class_names: names of the classes, by label.
        max_detections: number of objects a picture that count, the best first.
    """
    from faster_coco_eval import COCO, COCOeval_faster
    from faster_coco_eval.faster_eval_api_cpp import COCOevalAccumulate

    wanted = COCO(_ground_truth(truths, class_names))
    scored = COCOeval_faster(
        wanted, wanted.loadRes(_results(found, "bbox")), "bbox", separate_eval=True
    )
    scored.params.areaRng, scored.params.areaRngLbl = scored.params.areaRng[:1], ["all"]
    scored.params.maxDets = [max_detections]
    scored.evaluate()
    matched, num_pictures = scored._evalImgs_cpp, len(truths)  # by class, then by picture

    def average_precision(counts: np.ndarray) -> float | None:
        chosen = np.repeat(np.arange(num_pictures), counts).tolist()
        drawn = [
            matched[label * num_pictures + picture]
            for label in range(len(class_names))
            for picture in chosen
        ]
        return _mean(COCOevalAccumulate(scored._paramsEval, drawn)["precision"])

    return average_precision


def _mean(values: np.ndarray) -> float | None:
    """Mean of the values that could be measured; COCO marks the others with -1."""
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else None


def _ground_truth(truths: Sequence[GroundTruth], class_names: Sequence[str]) -> dict[str, Any]:
    annotations: list[dict[str, Any]] = []
    for picture, truth in enumerate(truths):
        for number, box in enumerate(truth.boxes):
            thing = {
                "id": len(annotations) + 1,  # 0 would stand for no match
                "image_id": picture,
                "category_id": int(truth.labels[number]),
                "bbox": _with_size(box),
                "area": float(truth.areas[number]),
                "iscrowd": int(truth.crowd[number]),
            }
            if truth.masks is not None:
                thing["segmentation"] = truth.masks[number]
            annotations.append(thing)
    return {
        "images": [
            {"id": picture, "height": truth.size[0], "width": truth.size[1]}
            for picture, truth in enumerate(truths)
        ],
        "annotations": annotations,
        "categories": [{"id": label, "name": name} for label, name in enumerate(class_names)],
    }


def _results(found: Sequence[Detections], by: Overlap) -> list[dict[str, Any]]:
    results = []
    for picture, objects in enumerate(found):
        for number, score in enumerate(objects.scores):
            result: dict[str, Any] = {
                "image_id": picture,
                "category_id": int(objects.labels[number]),
                "score": float(score),
            }
            if by == "bbox":
                result["bbox"] = _with_size(objects.boxes[number])
            else:
                assert objects.masks is not None
                result["segmentation"] = objects.masks[number]
            results.append(result)
    return results


def _with_size(box: np.ndarray) -> list[float]:
    """(left, top, right, bottom) as COCO's (left, top, width, height)."""
    left, top, right, bottom = box.tolist()
    return [left, top, right - left, bottom - top]
