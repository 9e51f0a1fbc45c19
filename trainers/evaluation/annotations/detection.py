"""Finds and opens labelled objects at a place, be they in COCO or in Pascal VOC."""

from __future__ import annotations

from functools import partial
from typing import Literal

from mimray.trainers.data.files import absolute, join
from mimray.trainers.errors import DataError
from mimray.trainers.evaluation.annotations.base import DetectionSet, InvalidLabels
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
    invalid_labels: InvalidLabels,
    progress: Progress | None = None,
    *,
    shared: bool = False,
    need_masks: bool = False,
) -> DetectionSet:
    """Open pictures with labelled objects.

    Recognised are a COCO JSON file; a folder with `annotations/instances_<split>.json`,
    `instances_<split>.json`, `<split>/instances.json` or `instances.json` (and the names that
    COCO's own releases, CVAT and Roboflow give these); a Pascal VOC folder.

    Args:
        uri: URI of the file or folder.
        split: part to open; for `val` the first of val, valid, validation, dev and test. A place
            that is not split is taken whole.
        invalid_labels: collects labels that are wrong, or refuses them.
        progress: called with the number of pictures checked.
        shared: True if `uri` holds the training pictures too, so that a place without a
            validation split has no validation pictures.
        need_masks: True if an object without a mask is wrong where others have one.

    Raises:
        DataError: nothing of the kind is there, or no such split.
    """
    uri = absolute(uri)
    open_coco = partial(
        CocoDetection,
        images_uri=None,
        invalid_labels=invalid_labels,
        progress=progress,
        need_masks=need_masks,
    )
    if uri.endswith(".json"):
        if shared and split == "val":
            raise no_validation(uri)
        return open_coco(uri)
    place = RunDir(uri)
    voc = place.exists(PICTURES) and place.exists(ANNOTATIONS)
    for name in SPLIT_NAMES[split]:
        if voc and place.exists(f"{SPLITS}/{name}.txt"):
            return VocDetection(uri, name, invalid_labels, progress)
        for pattern in _SPLIT_FILES:
            file = pattern.format(name)
            if place.exists(file):
                return open_coco(join(uri, file))
    if shared and split == "val":
        raise no_validation(uri)
    if voc:
        return VocDetection(uri, None, invalid_labels, progress)
    for file in _WHOLE_FILES:
        if place.exists(file):
            return open_coco(join(uri, file))
    raise DataError(
        f"no annotation file for {split} at {uri}",
        hint=f"COCO: annotations/instances_{split}.json or {split}/instances.json; "
        f"Pascal VOC: {PICTURES}, {ANNOTATIONS} and {SPLITS}/{split}.txt",
    )


def no_validation(uri: str) -> DataError:
    """The error of a dataset that is scored on itself and has no split to score on."""
    return DataError(
        f"{uri} has no validation or test split of its own", hint="name one with --val"
    )
