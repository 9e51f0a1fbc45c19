"""Finds and opens labelled pixels at a place, whatever their format, and checks every label."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np

from mimray.trainers.config.evaluation.segmentation import SegmentationConfig
from mimray.trainers.data.files import absolute, is_file, join, list_files
from mimray.trainers.data.hold_out import HoldOut, hold_out_note
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
        split: part to open; for `val` the configured one, or the first of `VALIDATION_SPLITS`. A
            place that is not split is taken whole.
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


class SegmentationSplits(NamedTuple):
    """Pictures to learn from and to score on, with a class for each pixel.

    Attributes:
        train: pictures to learn from.
        val: pictures to score on; their classes are those of `train`.
        hold_out: the rule by which these were held out of the former; None where they have a place
            of their own.
        notes: what people need to know of it.
    """

    train: SegmentationSet
    val: SegmentationSet
    hold_out: HoldOut | None
    notes: tuple[str, ...]


def open_segmentation_splits(
    setting: Setting, config: SegmentationConfig, invalid_labels: InvalidLabels
) -> SegmentationSplits:
    """Open the pictures to learn from and those to score on, and check all of them.

    Raises:
        DataError: as of `open_segmentation`.
        EmptyDatasetError: no picture is left.
    """
    found = _open_readers(setting, config, invalid_labels)
    learnt, scored = (p[evenly_spread(len(p), setting.limit)] for p in (found.learnt, found.scored))
    progress = setting.progress
    train: _Checked | _PartOfChecked
    val: _Checked | _PartOfChecked
    if found.hold_out is not None:
        # Masks without names number their classes together, whichever of them are held out.
        both = np.union1d(learnt, scored)
        whole = _checked(found.train, both, config, invalid_labels, (), None, progress)
        train, val = _PartOfChecked(whole, learnt), _PartOfChecked(whole, scored)
    else:
        train = _checked(found.train, learnt, config, invalid_labels, (), None, progress)
        names, binary = train.class_names, train.binary
        val = _checked(found.val, scored, config, invalid_labels, names, binary, progress)
    unlearnt = [train.class_names[label] for label in sorted(val.present - train.present)]
    notes = found.notes
    if unlearnt:
        notes += (
            f"classes without a pixel to learn from, which no head finds: {', '.join(unlearnt)}",
        )
    return SegmentationSplits(train, val, found.hold_out, notes)


def check_segmentation_splits(
    setting: Setting, config: SegmentationConfig
) -> tuple[frozenset[str], frozenset[str]]:
    """Open the pictures to learn from and those to score on, and check the first of each only.

    Returns:
        The places of the pictures to learn from and of those to score on, without the limit.

    Raises:
        DataError: as of `open_segmentation`.
    """
    found = _open_readers(setting, config, InvalidLabels(skip=False))
    names = _class_names(found.train, config, ())
    places = []
    for reader, part in ((found.train, found.learnt), (found.val, found.scored)):
        first = int(part[0])
        _check_range(reader[first].mask, len(names), reader.ignore_index, reader.label_name(first))
        places.append(frozenset(reader.name(index) for index in part.tolist()))
    return places[0], places[1]


class _Readers(NamedTuple):
    """Both readers, which are one where pictures are held out, and the pictures of each."""

    train: _Reader
    val: _Reader
    learnt: np.ndarray
    scored: np.ndarray
    hold_out: HoldOut | None
    notes: tuple[str, ...]


def _open_readers(
    setting: Setting, config: SegmentationConfig, invalid_labels: InvalidLabels
) -> _Readers:
    """Open the places without reading a mask."""
    place, hold_out = absolute(setting.data), None
    opened = _find(place, "train", config, False)
    try:
        val_opened = _find(absolute(setting.val or place), "val", config, setting.val is None)
    except NoValidationError:
        hold_out = setting.hold_out
    train = val = opened(invalid_labels)
    notes: tuple[str, ...] = ()
    if hold_out is None:
        val = _matched(val_opened(invalid_labels), train)
        learnt, scored = np.arange(len(train)), np.arange(len(val))
    else:
        learnt, scored = choose_held_out(train, place, hold_out)
        notes = (hold_out_note(len(scored), len(train), hold_out, by_class=False),)
    if setting.part is not None:
        scored = scored[setting.part.indices(len(scored), None, val.uri)]
    return _Readers(train, val, learnt, scored, hold_out, notes)


def _matched(val: _Reader, train: _Reader) -> _Reader:
    """Pictures to score on with the numbers that the pictures to learn from give their classes."""
    ours, theirs = train.class_names, val.class_names
    if not ours or not theirs or theirs == ours:
        return val
    unknown = [name for name in theirs if name not in ours]
    if unknown:
        raise DataError(
            f"{val.uri} has class {unknown[0]!r} among {_listed(theirs)}; the pictures trained on "
            f"have {_listed(ours)}",
            hint="pictures to score on need the classes of those to learn from",
        )
    return _Renumbered(val, ours)


def _checked(
    reader: _Reader,
    indices: np.ndarray,
    config: SegmentationConfig,
    invalid_labels: InvalidLabels,
    class_names: tuple[str, ...],
    binary: bool | None,
    progress: Progress | None,
) -> _Checked:
    names = _class_names(reader, config, class_names)
    if binary is None:
        binary = _may_be_binary(reader, config, names) and _holds_255_alone(reader, indices)
    if binary:
        reader, names = _Binary(reader), names or BINARY_NAMES
    return _Checked(reader, names, binary, indices, invalid_labels, progress)


def _class_names(
    reader: _Reader, config: SegmentationConfig, class_names: tuple[str, ...]
) -> tuple[str, ...]:
    """Names of the classes by number: those trained on, asked for, or the reader's own; or none."""
    names = class_names or config.class_names or reader.class_names
    if not names and config.num_classes:
        names = tuple(map(str, range(config.num_classes)))
    if class_names and reader.class_names not in ((), class_names) and not config.class_names:
        raise DataError(
            f"{reader.uri} has classes {_listed(reader.class_names)}, the pictures trained on "
            f"{_listed(class_names)}",
            hint="pictures to learn from and to score on need the same classes",
        )
    if config.class_names and reader.class_names and len(names) != len(reader.class_names):
        raise DataError(
            f"{reader.uri} has {len(reader.class_names)} classes, {_listed(reader.class_names)}; "
            f"class_names names {len(names)}",
            hint="class_names gives each of them another name, in this order",
        )
    if config.num_classes not in (None, len(names)):
        raise DataError(
            f"{reader.uri} has {len(names)} classes, num_classes is {config.num_classes}"
        )
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise DataError(f"{reader.uri}: two classes are called {twice[0]!r}")
    return names


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


class _Renumbered:
    """Masks with the class numbers of other pictures, by name; these may have further classes."""

    def __init__(self, reader: _Reader, class_names: tuple[str, ...]) -> None:
        self._reader = reader
        self._numbers = np.array([class_names.index(name) for name in reader.class_names])
        self.uri, self.class_names = reader.uri, class_names
        self.ignore_index = reader.ignore_index
        self.name, self.label_name = reader.name, reader.label_name
        self.is_turned = reader.is_turned

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> SegmentationExample:
        image, mask = self._reader[index]
        _check_range(mask, len(self._numbers), self.ignore_index, self.label_name(index))
        known = mask != self.ignore_index
        renumbered = mask.copy()
        renumbered[known] = self._numbers[mask[known]]
        return SegmentationExample(image, renumbered)


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
        # The pictures that can be used, each with the classes in its mask.
        self.kept: dict[int, frozenset[int]] = {}
        digest, largest = hashlib.sha256(), -1
        for number, index in enumerate(indices.tolist()):
            try:
                image, mask = reader[index]
                _check_range(mask, len(class_names), self.ignore_index, reader.label_name(index))
            except DataError as error:
                invalid_labels.add(reader.name(index), Fault(UNUSABLE, str(error)))
            else:
                known = mask != self.ignore_index
                self.kept[index] = frozenset(np.unique(mask[known]).tolist())
                largest = max(largest, *self.kept[index], -1)
                invalid_labels.adapt(TURNED, int(reader.is_turned(index)))
                invalid_labels.adapt(READ_AS_BINARY, int(binary))
                digest.update(np.ascontiguousarray(image).tobytes())
                digest.update(mask.tobytes())
            if progress is not None:
                progress("checking masks", number + 1, len(indices))
        if not self.kept:
            raise _none_usable(self.uri, "; ".join(invalid_labels.found[:1]))
        if largest < 0:
            raise _all_void(self.uri, self.ignore_index)
        present = self.present
        if not class_names and largest >= MOST_UNNAMED:
            raise DataError(
                f"the masks of {self.uri} hold {len(present)} values up to {largest}, which would "
                f"be {largest + 1} classes",
                hint="number the classes 0, 1, …; classes.txt or --set num_classes=… says how many",
            )
        if not class_names:
            invalid_labels.adapt(
                f"class numbers below {largest + 1} that occur in no mask",
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

        self._order = list(self.kept)

    @property
    def present(self) -> frozenset[int]:
        """Classes of which there is a pixel."""
        return frozenset().union(*self.kept.values())

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> SegmentationExample:
        return self.read(self._order[index])

    def read(self, number: int) -> SegmentationExample:
        """Read a picture by its number in the place, where some may have been left out."""
        return self._reader[number]

    def name(self, index: int) -> str:
        return self.name_of(self._order[index])

    def name_of(self, number: int) -> str:
        """Place of a picture by its number, likewise."""
        return self._reader.name(number)


class _PartOfChecked:
    """Some pictures of a set; their classes are those of the whole."""

    def __init__(self, whole: _Checked, numbers: np.ndarray) -> None:
        self._whole = whole
        self._order = [number for number in numbers.tolist() if number in whole.kept]
        self.uri, self.class_names = whole.uri, whole.class_names
        self.ignore_index, self.binary = whole.ignore_index, whole.binary
        if not self._order:
            raise _none_usable(self.uri, "name pictures to score on with --val")
        self.present = frozenset[int]().union(*(whole.kept[number] for number in self._order))
        if not self.present:
            raise _all_void(self.uri, self.ignore_index)
        content = whole.fingerprint.encode() + np.array(self._order, np.int64).tobytes()
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> SegmentationExample:
        return self._whole.read(self._order[index])

    def name(self, index: int) -> str:
        return self._whole.name_of(self._order[index])


def _none_usable(uri: str, hint: str) -> EmptyDatasetError:
    return EmptyDatasetError(f"{uri} holds no picture with a mask that can be used", hint=hint)


def _all_void(uri: str, ignore_index: int) -> DataError:
    return DataError(
        f"every pixel of {uri} is void ({ignore_index})",
        hint="--set ignore_index=… says what is void in index masks",
    )


def _check_range(mask: np.ndarray, num_classes: int, ignore_index: int, where: str) -> None:
    """Refuse a value that is neither a class nor void; `num_classes` 0 knows no upper bound."""
    outside = (mask != ignore_index) & (mask < 0)
    if num_classes:
        outside |= (mask != ignore_index) & (mask >= num_classes)
    if outside.any():
        row, column = np.argwhere(outside)[0].tolist()
        classes = f"0 to {num_classes - 1}" if num_classes else "0, 1, …"
        raise DataError(
            f"{where} has {mask[row, column]} at row {row}, column {column}; "
            f"classes are {classes}, void is {ignore_index}",
        )


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
