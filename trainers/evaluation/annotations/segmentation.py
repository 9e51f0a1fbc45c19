"""Finds and opens labelled pixels at a place, whatever their format, and checks every label."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Protocol

import numpy as np

from mimray.trainers.config.evaluation.segmentation import SegmentationConfig
from mimray.trainers.data.files import absolute, is_file, join, list_files
from mimray.trainers.data.hold_out import HoldOut
from mimray.trainers.data.selection import evenly_spread
from mimray.trainers.errors import DataError, EmptyDatasetError
from mimray.trainers.evaluation.annotations.base import (
    DetectionSet,
    Fault,
    InvalidLabels,
    SegmentationExample,
    SegmentationSet,
)
from mimray.trainers.evaluation.annotations.detection import (
    SPLIT_NAMES,
    NoValidationError,
    Split,
    choose_held_out,
    find_detection,
    no_validation,
)
from mimray.trainers.evaluation.annotations.pairs import MASK_FOLDERS, PairFolder, pair_folders
from mimray.trainers.evaluation.annotations.panoptic import VOID, CocoPanoptic, is_panoptic
from mimray.trainers.evaluation.annotations.pictures import TURNED
from mimray.trainers.evaluation.score import Progress, Setting

# The usual value of void; in masks that hold nothing else but 0 it stands for class 1.
BINARY = 255
BINARY_NAMES = ("0", "255")
READ_AS_BINARY = "masks of 0 and 255 alone read as two classes, 255 as the second"
UNUSABLE = "masks or pictures that cannot be used"
# Masks with larger values, and no names of classes, number something else.
MOST_UNNAMED = 4096
_SPLIT_FILES = (
    "annotations/panoptic_{0}.json",
    "annotations/panoptic_{0}2017.json",
    "panoptic_{0}.json",
    "{0}/panoptic.json",
)


class _Reader(Protocol):
    """Pictures and masks in one format; reading one raises a `DataError` where it is wrong."""

    uri: str
    class_names: tuple[str, ...]
    ignore_index: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> SegmentationExample: ...

    def name(self, index: int) -> str: ...

    def label_name(self, index: int) -> str: ...

    def is_turned(self, index: int) -> bool: ...


def open_segmentation(
    uri: str,
    split: Split,
    config: SegmentationConfig,
    invalid_labels: InvalidLabels,
    *,
    shared: bool = False,
    class_names: tuple[str, ...] = (),
    binary: bool | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> SegmentationSet:
    """Open pictures with a class for each pixel, and check all of them.

    Recognised are, in this order: folders of pictures beside folders of index masks (see
    `pair_folders`); COCO panoptic (`annotations/panoptic_<split>.json`, `<split>/panoptic.json`,
    `panoptic.json`); COCO detection with instance masks, where class 0 is the background and
    later objects lie on top. `uri` may also be such a JSON file.

    Args:
        uri: URI of a folder or a JSON file.
        split: part to open; for `val` the configured one, or the first of val, valid, validation,
            dev and test. A place that is not split is taken whole.
        config: the task's options, which may name classes and the value of void.
        invalid_labels: collects labels that are wrong, or refuses them.
        shared: True if `uri` holds the training pictures too, so that a place without a
            validation split has no validation pictures.
        class_names: classes of the training pictures, which pictures to score on must have too.
        binary: True if 255 stands for class 1, as in the pictures trained on; None tells it from
            the masks.
        limit: number of pictures to take, evenly spread; None takes all.
        progress: called with the number of pictures checked.

    Raises:
        DataError: nothing of the kind is there, no such split, or a label is wrong.
        EmptyDatasetError: no picture is left.
    """
    reader = _find(absolute(uri), split, config, shared)(invalid_labels)
    indices = evenly_spread(len(reader), limit)
    return _checked(reader, indices, config, invalid_labels, class_names, binary, progress)


def open_segmentation_splits(
    setting: Setting, config: SegmentationConfig, invalid_labels: InvalidLabels
) -> tuple[SegmentationSet, SegmentationSet, HoldOut | None]:
    """Open the pictures to learn from and those to score on, and check all of them.

    Returns:
        Both, and the rule by which the latter were held out of the former, or None.

    Raises:
        DataError: as of `open_segmentation`.
        EmptyDatasetError: no picture is left.
    """
    place, hold_out = absolute(setting.data), None
    opened = _find(place, "train", config, False)
    try:
        val_opened = _find(absolute(setting.val or place), "val", config, setting.val is None)
    except NoValidationError:
        hold_out = setting.hold_out
    train_reader = val_reader = opened(invalid_labels)
    if hold_out is None:
        val_reader = val_opened(invalid_labels)
        parts = [np.arange(len(train_reader)), np.arange(len(val_reader))]
    else:
        parts = [*choose_held_out(train_reader, place, hold_out)]
    if setting.part is not None:
        parts[1] = parts[1][setting.part.indices(len(parts[1]), None, val_reader.uri)]
    train_part, val_part = (part[evenly_spread(len(part), setting.limit)] for part in parts)
    train = _checked(train_reader, train_part, config, invalid_labels, (), None, setting.progress)
    val = _checked(
        val_reader,
        val_part,
        config,
        invalid_labels,
        train.class_names,
        train.binary,
        setting.progress,
    )
    return train, val, hold_out


def _checked(
    reader: _Reader,
    indices: np.ndarray,
    config: SegmentationConfig,
    invalid_labels: InvalidLabels,
    class_names: tuple[str, ...],
    binary: bool | None,
    progress: Progress | None,
) -> _Checked:
    names = class_names or config.class_names or reader.class_names
    if not names and config.num_classes:
        names = tuple(map(str, range(config.num_classes)))
    if class_names and reader.class_names not in ((), class_names) and not config.class_names:
        raise DataError(
            f"{reader.uri} has classes {_listed(reader.class_names)}, the pictures trained on "
            f"{_listed(class_names)}",
            hint="pictures to learn from and to score on need the same classes",
        )
    if config.num_classes not in (None, len(names)):
        raise DataError(
            f"{reader.uri} has {len(names)} classes, num_classes is {config.num_classes}"
        )
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise DataError(f"{reader.uri}: two classes are called {twice[0]!r}")
    if binary is None:
        binary = _may_be_binary(reader, config, names) and _holds_255_alone(reader, indices)
    if binary:
        reader, names = _Binary(reader), names or BINARY_NAMES
    return _Checked(reader, names, binary, indices, invalid_labels, progress)


def _find(
    uri: str, split: Split, config: SegmentationConfig, shared: bool
) -> Callable[[InvalidLabels], _Reader]:
    """Find labelled pixels, and the function that opens them."""

    def instances() -> Callable[[InvalidLabels], _Reader]:
        found = find_detection(uri, split, shared=shared, need_masks=True)
        return lambda invalid_labels: _Instances(found(invalid_labels, None))

    if uri.endswith(".json"):
        if shared and split == "val":
            raise no_validation(uri)
        return partial(CocoPanoptic, uri) if is_panoptic(uri) else instances()
    pairs = pair_folders(uri)
    ignore_index = BINARY if config.ignore_index is None else config.ignore_index

    def open_pairs(images: str, masks: str) -> Callable[[InvalidLabels], _Reader]:
        return lambda invalid_labels: PairFolder(
            uri, images, masks, ignore_index=ignore_index, invalid_labels=invalid_labels
        )

    names = (config.val_split,) if split == "val" and config.val_split else SPLIT_NAMES[split]
    for name in names:
        if name in pairs:
            return open_pairs(*pairs[name])
    if pairs and "" not in pairs and shared and split == "val" and not config.val_split:
        raise no_validation(uri)
    if pairs and "" not in pairs:
        raise DataError(
            f"{uri} has no {' or '.join(names)} split", hint=f"splits found: {', '.join(pairs)}"
        )
    if pairs and not (shared and split == "val"):
        return open_pairs(*pairs[""])
    for name in names:
        for pattern in _SPLIT_FILES:
            if is_file(file := join(uri, pattern.format(name))):
                return partial(CocoPanoptic, file)
    if shared and split == "val" and (pairs or is_file(join(uri, "panoptic.json"))):
        raise no_validation(uri)
    if is_file(file := join(uri, "panoptic.json")):
        return partial(CocoPanoptic, file)
    if not any(file.path.endswith(".json") for file in list_files(uri)):
        raise DataError(
            f"no masks for {split} at {uri}",
            hint=f"{split}/images beside {split}/{{{','.join(MASK_FOLDERS)}}}, "
            f"images/{split} beside masks/{split}, {split} beside {split}annot, "
            f"or COCO's annotations/panoptic_{split}.json or instances_{split}.json",
        )
    return instances()


class _Instances:
    """Objects painted over each other on a background, class 0; crowds are void."""

    ignore_index = VOID

    def __init__(self, objects: DetectionSet) -> None:
        self._objects = objects
        self.uri = self._objects.uri
        if not self._objects.has_masks:
            raise DataError(f"the objects of {self.uri} have boxes only, no masks")
        self.class_names = ("background", *self._objects.class_names)

    def __len__(self) -> int:
        return len(self._objects)

    def __getitem__(self, index: int) -> SegmentationExample:
        found = self._objects[index]
        assert found.masks is not None
        mask = np.zeros((found.image.height, found.image.width), np.int64)
        for label, crowd, where in zip(found.labels, found.crowd, found.masks, strict=True):
            mask[where] = VOID if crowd else label + 1
        return SegmentationExample(found.image, mask)

    def name(self, index: int) -> str:
        """Path of a picture."""
        return self._objects.name(index)

    def label_name(self, index: int) -> str:
        """The file of all labels."""
        return self.uri

    def is_turned(self, index: int) -> bool:
        """False: pictures that EXIF turns were counted as the file was opened."""
        return False


class _Binary:
    """Masks of 0 and 255, as programs for painting save them: 255 is class 1, and none is void."""

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader
        self.uri, self.class_names = reader.uri, reader.class_names
        self.ignore_index = reader.ignore_index
        self.name, self.label_name = reader.name, reader.label_name
        self.is_turned = reader.is_turned

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> SegmentationExample:
        image, mask = self._reader[index]
        if not _is_binary(mask):
            raise DataError(
                f"{self.label_name(index)} holds other values than 0 and 255, which the masks to "
                "learn from hold alone"
            )
        return SegmentationExample(image, mask // BINARY)


def _is_binary(mask: np.ndarray) -> bool:
    return bool(((mask == 0) | (mask == BINARY)).all())


def _may_be_binary(
    reader: _Reader, config: SegmentationConfig, class_names: tuple[str, ...]
) -> bool:
    """True if nobody said that 255 is void, nor that there are more than two classes."""
    of_folders = reader.ignore_index == BINARY
    return of_folders and config.ignore_index is None and len(class_names) in (0, 2)


def _holds_255_alone(reader: _Reader, indices: np.ndarray) -> bool:
    """True if all masks hold 0 and 255 alone, and both; stops at the first other one."""
    seen: set[int] = set()
    for index in indices.tolist():
        try:
            mask = reader[index].mask
        except DataError:  # told when labels are checked
            continue
        if not _is_binary(mask):
            return False
        seen.update((int(mask.min(initial=BINARY)), int(mask.max(initial=0))))
    return seen == {0, BINARY}


class _Checked:
    """The pictures of a set that can be read and keep to the classes; each was read once."""

    def __init__(
        self,
        reader: _Reader,
        class_names: tuple[str, ...],
        binary: bool,
        indices: np.ndarray,
        invalid_labels: InvalidLabels,
        progress: Progress | None,
    ) -> None:
        self.uri, self.ignore_index = reader.uri, reader.ignore_index
        self.binary = binary
        self._reader = reader
        self._kept: list[int] = []
        digest, largest = hashlib.sha256(), -1
        present: set[int] = set()
        for number, index in enumerate(indices.tolist()):
            try:
                image, mask = reader[index]
                _check_range(mask, len(class_names), self.ignore_index, reader.label_name(index))
            except DataError as error:
                invalid_labels.add(reader.name(index), Fault(UNUSABLE, str(error)))
            else:
                self._kept.append(index)
                known = mask != self.ignore_index
                largest = int(mask.max(initial=largest, where=known))
                present.update(np.unique(mask[known]).tolist())
                invalid_labels.adapt(TURNED, int(reader.is_turned(index)))
                invalid_labels.adapt(READ_AS_BINARY, int(binary))
                digest.update(np.ascontiguousarray(image).tobytes())
                digest.update(mask.tobytes())
            if progress is not None:
                progress("checking masks", number + 1, len(indices))
        if not self._kept:
            raise EmptyDatasetError(
                f"{self.uri} holds no picture with a mask that can be used",
                hint="; ".join(invalid_labels.found[:1]),
            )
        if largest < 0:
            raise DataError(
                f"every pixel of {self.uri} is void ({self.ignore_index})",
                hint="--set ignore_index=… says what is void in index masks",
            )
        if not class_names and largest >= MOST_UNNAMED:
            raise DataError(
                f"the masks of {self.uri} hold {len(present)} values up to {largest}, which would "
                f"be {largest + 1} classes",
                hint="number the classes 0, 1, …; classes.txt or --set num_classes=… says how many",
            )
        if not class_names:
            invalid_labels.adapt(
                f"class numbers below {largest + 1} that occur in no mask to learn from",
                largest + 1 - len(present),
            )
        self.class_names = class_names or tuple(map(str, range(largest + 1)))
        if len(self.class_names) < 2:
            raise DataError(
                f"the masks of {self.uri} hold no class but 0 and void ({self.ignore_index})",
                hint="classes are 0, 1, …; --set ignore_index=… says what is void",
            )
        digest.update(repr(self.class_names).encode())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> SegmentationExample:
        return self._reader[self._kept[index]]

    def name(self, index: int) -> str:
        return self._reader.name(self._kept[index])


def _check_range(mask: np.ndarray, num_classes: int, ignore_index: int, where: str) -> None:
    """Refuse a value that is neither a class nor void; `num_classes` 0 knows no bound."""
    if not num_classes:
        return
    outside = (mask != ignore_index) & ((mask < 0) | (mask >= num_classes))
    if outside.any():
        row, column = np.argwhere(outside)[0].tolist()
        raise DataError(
            f"{where} has {mask[row, column]} at row {row}, column {column}; "
            f"classes are 0 to {num_classes - 1}, void is {ignore_index}",
        )


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
