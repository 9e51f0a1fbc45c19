"""COCO's figures against pycocotools on fixed random predictions."""

from __future__ import annotations

import contextlib
import copy
import io

import numpy as np
import pytest
from pycocotools import mask as reference_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mimray.trainers.evaluation.detection.detector import Detections
from mimray.trainers.evaluation.detection.metrics import GroundTruth, coco_figures

CLASSES = ("cup", "plate", "spoon", "never seen", "only crowds")
SIZE = (160, 220)
NAMES = (
    *("AP", "AP50", "AP75", "APs", "APm", "APl"),
    *("AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
)


def _boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    sides = np.exp(rng.uniform(np.log(6), np.log(150), (count, 2)))
    corner = rng.uniform(0, 1, (count, 2)) * (np.array(SIZE[::-1]) - sides)
    return np.concatenate([corner, corner + sides], axis=1)


def _mask(box: np.ndarray) -> dict:
    left, top, right, bottom = box.round().astype(int)
    mask = np.zeros(SIZE, np.uint8)
    mask[max(0, top) : bottom, max(0, left) : right] = 1
    return reference_masks.encode(np.asfortranarray(mask))


def _scenes(seed: int) -> tuple[list[GroundTruth], list[Detections]]:
    """Pictures with crowds, small and large objects, none at all, and near and far predictions."""
    rng = np.random.default_rng(seed)
    truths, found = [], []
    for picture in range(12):
        count = 0 if picture in (3, 7) else int(rng.integers(1, 9))
        boxes = _boxes(rng, count)
        labels = rng.integers(0, 3, count)
        crowd = rng.random(count) < 0.15
        if count:
            labels[0] = 4 if picture % 2 else labels[0]
            crowd |= labels == 4
        masks = [_mask(box) for box in boxes]
        areas = np.array([float(reference_masks.area(m)) for m in masks]).reshape(-1)
        truths.append(GroundTruth(SIZE, boxes, labels, crowd, areas, masks))
        extra = 0 if picture == 5 else int(rng.integers(0, 12))
        near = boxes + rng.normal(0, 4, boxes.shape)
        guesses = np.concatenate([near, _boxes(rng, extra)]).clip(0, [*SIZE[::-1]] * 2)
        guesses[:, 2:] = np.maximum(guesses[:, 2:], guesses[:, :2] + 1)
        guessed = np.concatenate([labels, rng.integers(0, 5, extra)])
        scores = rng.random(len(guesses)).round(2)  # with ties
        best = np.argsort(-scores, kind="stable")
        shapes = [_mask(box) for box in guesses]
        found.append(
            Detections(guesses[best], scores[best], guessed[best], [shapes[i] for i in best])
        )
    return truths, found


def _reference(truths: list[GroundTruth], found: list[Detections], by: str) -> COCOeval:
    data = {
        "info": {},
        "images": [{"id": i, "height": SIZE[0], "width": SIZE[1]} for i in range(len(truths))],
        "categories": [{"id": k, "name": name} for k, name in enumerate(CLASSES)],
        "annotations": [],
    }
    for i, truth in enumerate(truths):
        for k, (left, top, right, bottom) in enumerate(truth.boxes):
            data["annotations"].append(
                {
                    "id": len(data["annotations"]) + 1,
                    "image_id": i,
                    "category_id": int(truth.labels[k]),
                    "bbox": [left, top, right - left, bottom - top],
                    "area": truth.areas[k],
                    "iscrowd": int(truth.crowd[k]),
                    "segmentation": copy.deepcopy(truth.masks[k]),
                }
            )
    results = []
    for i, objects in enumerate(found):
        for k, (left, top, right, bottom) in enumerate(objects.boxes):
            place = (
                {"bbox": [left, top, right - left, bottom - top]}
                if by == "bbox"
                else {"segmentation": copy.deepcopy(objects.masks[k])}
            )
            results.append(
                {
                    "image_id": i,
                    "category_id": int(objects.labels[k]),
                    "score": objects.scores[k],
                    **place,
                }
            )
    with contextlib.redirect_stdout(io.StringIO()):
        wanted = COCO()
        wanted.dataset = data
        wanted.createIndex()
        scored = COCOeval(wanted, wanted.loadRes(results), by)
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    return scored


@pytest.mark.parametrize("by", ["bbox", "segm"])
@pytest.mark.parametrize("seed", [0, 1])
def test_figures__equal_pycocotools(seed: int, by: str) -> None:
    truths, found = _scenes(seed)
    ours = coco_figures(truths, found, CLASSES, by=by)
    theirs = _reference(truths, found, by)
    assert 0.05 < theirs.stats[0] < 0.95
    for name, value in zip(NAMES, theirs.stats, strict=True):
        assert ours.values[name] == pytest.approx(value, abs=1e-6), name
    precision = theirs.eval["precision"]
    for label, name in enumerate(CLASSES[:3]):
        ap = precision[:, :, label, 0, -1].mean()
        assert ours.per_class[name]["AP"] == pytest.approx(ap, abs=1e-6)
        assert ours.curves[label] == pytest.approx(precision[0, :, label, 0, -1], abs=1e-6)


def test_figures__class_without_objects_is_none_and_in_no_mean() -> None:
    truths, found = _scenes(0)
    figures = coco_figures(truths, found, CLASSES, by="bbox")
    for name in ("never seen", "only crowds"):
        assert figures.per_class[name] == {"AP": None, "AP50": None}
    measured = [figures.per_class[name]["AP"] for name in CLASSES[:3]]
    assert figures.values["AP"] == pytest.approx(np.mean(measured))
    assert np.isnan(figures.curves[3:]).all()


def test_figures__nothing_found_is_zero() -> None:
    truths, _ = _scenes(0)
    none = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64), [])
    for by in ("bbox", "segm"):
        figures = coco_figures(truths, [none] * len(truths), CLASSES, by=by)
        assert figures.values["AP"] == 0
        assert figures.values["AR100"] == 0


def test_figures__fewer_detections_a_picture_count() -> None:
    truths, found = _scenes(1)
    full = coco_figures(truths, found, CLASSES, by="bbox")
    short = coco_figures(truths, found, CLASSES, by="bbox", max_detections=3)
    assert {"AR1", "AR3"} == {name for name in short.values if name[2:].isdigit()} - {
        "AP50",
        "AP75",
    }
    assert short.values["AR3"] < full.values["AR100"]


def test_figures__what_is_there_is_perfect() -> None:
    truths, _ = _scenes(0)
    found = [
        Detections(t.boxes[~t.crowd], np.ones((~t.crowd).sum()), t.labels[~t.crowd], None)
        for t in truths
    ]
    assert coco_figures(truths, found, CLASSES, by="bbox").values["AP"] == pytest.approx(1)
