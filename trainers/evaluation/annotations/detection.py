"""Finds and opens labelled objects at a place, be they in COCO or in Pascal VOC."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Literal, Protocol

import numpy as np

from mimray.trainers.data.files import absolute, join, parent
from mimray.trainers.data.hold_out import HoldOut, choose, hold_out_note
from mimray.trainers.data.splits import VALIDATION_SPLITS
from mimray.trainers.errors import DataError
from mimray.trainers.evaluation.annotations.base import (
    DetectionExample,
    DetectionSet,
    InvalidLabels,
    LabelledSplits,
)
from mimray.trainers.evaluation.annotations.coco import CocoDetection
from mimray.trainers.evaluation.annotations.voc import ANNOTATIONS, PICTURES, SPLITS, VocDetection
from mimray.trainers.evaluation.score import Progress, Setting
from mimray.trainers.storage import RunDir

Split = Literal["train", "val"]
Open = Callable[[InvalidLabels, Progress | None], DetectionSet]
"""Opens a set, given what collects wrong labels and what is told of the progress."""


class Named(Protocol):
    """Pictures that have names."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Place of a picture."""
        ...


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
        split: part to open; for `val` the first of `VALIDATION_SPLITS`. A place that is not split
            is taken whole.
        invalid_labels: collects labels that are wrong, or refuses them.
        progress: called with the number of pictures checked.
        shared: True if `uri` holds the training pictures too, so that a place without a
            validation split has no validation pictures.
        need_masks: True if an object without a mask is wrong where others have one.

    Raises:
        DataError: nothing of the kind is there, or no such split.
    """
    found = find_detection(absolute(uri), split, shared=shared, need_masks=need_masks)
    return found(invalid_labels, progress)


def find_detection(
    uri: str, split: Split, *, shared: bool = False, need_masks: bool = False
) -> Open:
    """Find pictures with labelled objects, and the function that opens them; see `open_detection`.

    Raises:
        NoValidationError: the place is shared and has no validation split.
        DataError: nothing of the kind is there, or no such split.
    """

    def coco(file: str) -> Open:
        return lambda invalid_labels, progress: CocoDetection(
            file, None, invalid_labels, progress, need_masks=need_masks
        )

    if uri.endswith(".json"):
        if shared and split == "val":
            raise no_validation(uri)
        return coco(uri)
    place = RunDir(uri)
    voc = place.exists(PICTURES) and place.exists(ANNOTATIONS)
    for name in SPLIT_NAMES[split]:
        if voc and place.exists(f"{SPLITS}/{name}.txt"):
            return partial(VocDetection, uri, name)
        for pattern in _SPLIT_FILES:
            file = pattern.format(name)
            if place.exists(file):
                return coco(join(uri, file))
    if shared and split == "val":
        raise no_validation(uri)
    if voc:
        return partial(VocDetection, uri, None)
    for file in _WHOLE_FILES:
        if place.exists(file):
            return coco(join(uri, file))
    raise DataError(
        f"no annotation file for {split} at {uri}",
        hint=f"COCO: annotations/instances_{split}.json or {split}/instances.json; "
        f"Pascal VOC: {PICTURES}, {ANNOTATIONS} and {SPLITS}/{split}.txt",
    )


def open_detection_splits(
    setting: Setting, invalid_labels: InvalidLabels, *, need_masks: bool = False
) -> LabelledSplits[DetectionSet]:
    """Open the pictures to learn from and those to score on.

    Raises:
        DataError: as of `open_detection`.
    """
    place = absolute(setting.val or setting.data)
    train = open_detection(
        setting.data, "train", invalid_labels, setting.progress, need_masks=need_masks
    )
    try:
        opened = find_detection(place, "val", shared=setting.val is None, need_masks=need_masks)
    except NoValidationError:
        learnt, held = choose_held_out(train, place, setting.hold_out)
        note = hold_out_note(len(held), len(train), setting.hold_out, by_class=False)
        parts = PartOfDetection(train, learnt), PartOfDetection(train, held)
        return LabelledSplits(*parts, setting.hold_out, (note, *_unlearnt(*parts)))
    val = opened(invalid_labels, setting.progress)
    return LabelledSplits(train, val, None, _unlearnt(train, val))


def _unlearnt(train: DetectionSet, val: DetectionSet) -> tuple[str, ...]:
    """A note that names the classes of which there is no object to learn from."""
    learnt, scored = (
        {data.class_names[label] for index in range(len(data)) for label in data.labels(index)}
        for data in (train, val)
    )
    names = [name for name in val.class_names if name in scored - learnt]
    if not names:
        return ()
    return (f"no object of {', '.join(names)} to learn from: none of these can be found",)


def choose_held_out(pictures: Named, uri: str, rule: HoldOut) -> tuple[np.ndarray, np.ndarray]:
    """Choose pictures to hold out by their paths, relative to the data's place.

    Raises:
        DataError: there is one picture only.
    """
    place = parent(uri) if uri.endswith(".json") else uri
    names = [pictures.name(index).removeprefix(place) for index in range(len(pictures))]
    learnt, held = choose(names, rule)
    if not len(held):
        raise no_validation(uri)
    return learnt, held


class PartOfDetection:
    """Some pictures of a set.

    Args:
        whole: the set.
        indices: int64 [N], ascending: which pictures.
    """

    def __init__(self, whole: DetectionSet, indices: np.ndarray) -> None:
        self._whole, self._indices = whole, indices
        self.uri, self.class_names, self.has_masks = whole.uri, whole.class_names, whole.has_masks
        digest = hashlib.sha256(whole.fingerprint.encode() + indices.tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> DetectionExample:
        return self._whole[int(self._indices[index])]

    def labels(self, index: int) -> np.ndarray:
        """Classes of a picture's objects."""
        return self._whole.labels(int(self._indices[index]))

    def name(self, index: int) -> str:
        """Place of a picture."""
        return self._whole.name(int(self._indices[index]))


class NoValidationError(DataError):
    """A dataset that is scored on itself has no split to score on."""


def no_validation(uri: str) -> NoValidationError:
    """The error of a dataset that is scored on itself and has no split to score on."""
    return NoValidationError(
        f"{uri} has no validation or test split of its own", hint="name one with --val"
    )
