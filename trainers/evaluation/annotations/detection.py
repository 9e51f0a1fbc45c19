"""Finds out how objects are labelled at a place, and opens it."""

from __future__ import annotations

from typing import Literal

from mimray.trainers.data.files import absolute, join
from mimray.trainers.errors import DataError
from mimray.trainers.evaluation.annotations.base import Complaints, DetectionSet
from mimray.trainers.evaluation.annotations.coco import CocoDetection
from mimray.trainers.evaluation.annotations.voc import ANNOTATIONS, PICTURES, SPLITS, VocDetection
from mimray.trainers.evaluation.score import Progress
from mimray.trainers.evaluation.splits import VALIDATION_SPLITS
from mimray.trainers.storage import RunDir

Split = Literal["train", "val"]

# The first that is there is taken.
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": VALIDATION_SPLITS,
}
_SPLIT_FILES = (
    "annotations/instances_{0}.json",
    "annotations/instances_{0}2017.json",
    "annotations/instances_{0}2014.json",
    "annotations/{0}.json",
    "instances_{0}.json",
    "instances_{0}2017.json",
    "{0}/instances.json",
    "{0}/_annotations.coco.json",
)
_WHOLE_FILES = (
    "instances.json",
    "annotations/instances.json",
    "annotations/instances_default.json",
    "_annotations.coco.json",
)


def open_detection(
    uri: str,
    split: Split,
    complaints: Complaints,
    progress: Progress | None = None,
    *,
    own: bool = False,
) -> DetectionSet:
    """Open pictures with labelled objects.

    What is found: a COCO JSON file; a folder with `annotations/instances_<split>.json`,
    `instances_<split>.json`, `<split>/instances.json` or `instances.json` (and the names that
    COCO's own releases, CVAT and Roboflow give these); a Pascal VOC folder.

    Args:
        uri: of the file or folder.
        split: which part; for `val` the first of val, valid, validation, dev and test. A place
            that is not split is taken whole.
        complaints: takes what is wrong with labels.
        progress: told of the pictures checked.
        own: `uri` is what is trained on, so that without a part for `val` there is none.

    Raises:
        DataError: nothing of the kind is there, or no such split.
    """
    uri = absolute(uri)
    if uri.endswith(".json"):
        if own and split == "val":
            raise _no_validation(uri)
        return CocoDetection(uri, None, complaints, progress)
    place = RunDir(uri)
    voc = place.exists(PICTURES) and place.exists(ANNOTATIONS)
    for name in SPLIT_NAMES[split]:
        if voc and place.exists(f"{SPLITS}/{name}.txt"):
            return VocDetection(uri, name, complaints, progress)
        for pattern in _SPLIT_FILES:
            file = pattern.format(name)
            if place.exists(file):
                return CocoDetection(join(uri, file), None, complaints, progress)
    if own and split == "val":
        raise _no_validation(uri)
    if voc:
        return VocDetection(uri, None, complaints, progress)
    for file in _WHOLE_FILES:
        if place.exists(file):
            return CocoDetection(join(uri, file), None, complaints, progress)
    raise DataError(
        f"no annotation file for {split} at {uri}",
        hint=f"COCO: annotations/instances_{split}.json or {split}/instances.json; "
        f"Pascal VOC: {PICTURES}, {ANNOTATIONS} and {SPLITS}/{split}.txt",
    )


def _no_validation(uri: str) -> DataError:
    return DataError(
        f"{uri} has no validation or test split of its own", hint="name one with --val"
    )
