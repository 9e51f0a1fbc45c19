"""Finds and opens labelled pixels at a place, whatever their format, and checks every label."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from mimray.trainers.config.evaluation.pixel_labels import PixelLabelsConfig
from mimray.trainers.data.files import absolute, is_file, join, list_files
from mimray.trainers.data.hold_out import HoldOut, hold_out_note
from mimray.trainers.data.selection import evenly_spread
from mimray.trainers.errors import DataError
from mimray.trainers.evaluation.annotations.base import (
    InvalidLabels,
    LabelledSplits,
    SegmentationSet,
)
from mimray.trainers.evaluation.annotations.checked_masks import CheckedMasks, PartOfCheckedMasks
from mimray.trainers.evaluation.annotations.detection import (
    SPLIT_NAMES,
    NoValidationError,
    Split,
    choose_held_out,
    find_detection,
    no_validation,
)
from mimray.trainers.evaluation.annotations.mask_readers import (
    BINARY,
    BINARY_NAMES,
    BinaryMasks,
    MaskReader,
    PaintedInstances,
    RenumberedMasks,
    check_range,
    holds_255_alone,
)
from mimray.trainers.evaluation.annotations.pairs import MASK_FOLDERS, PairFolder, pair_folders
from mimray.trainers.evaluation.annotations.panoptic import CocoPanoptic, is_panoptic
from mimray.trainers.evaluation.score import Progress, Setting

_SPLIT_FILES = (
    "annotations/panoptic_{0}.json",
    "annotations/panoptic_{0}2017.json",
    "panoptic_{0}.json",
    "{0}/panoptic.json",
)


def has_pixel_masks(uri: str) -> bool:
    """True if index masks or COCO panoptic files lie at a place; masks of objects do not count.

    Raises:
        DataError: there is nothing at the place, or it cannot be read.
    """
    if uri.endswith(".json"):
        return is_panoptic(uri)
    if pair_folders(uri):
        return True
    names = (*SPLIT_NAMES["train"], *SPLIT_NAMES["val"])
    files = [pattern.format(name) for name in names for pattern in _SPLIT_FILES]
    return any(is_file(join(uri, file)) for file in (*files, "panoptic.json"))


def open_segmentation(
    uri: str,
    split: Split,
    config: PixelLabelsConfig,
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


def open_segmentation_splits(
    setting: Setting, config: PixelLabelsConfig, invalid_labels: InvalidLabels
) -> LabelledSplits[SegmentationSet]:
    """Open the pictures to learn from and those to score on, and check all of them.

    Raises:
        DataError: as of `open_segmentation`.
        EmptyDatasetError: no picture is left.
    """
    found = _open_readers(setting, config, invalid_labels)
    learnt, scored = (p[evenly_spread(len(p), setting.limit)] for p in (found.learnt, found.scored))
    progress = setting.progress
    train: CheckedMasks | PartOfCheckedMasks
    val: CheckedMasks | PartOfCheckedMasks
    if found.hold_out is not None:
        # Masks without names number their classes together, whichever of them are held out.
        both = np.union1d(learnt, scored)
        whole = _checked(found.train, both, config, invalid_labels, (), None, progress)
        train, val = PartOfCheckedMasks(whole, learnt), PartOfCheckedMasks(whole, scored)
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
    return LabelledSplits(train, val, found.hold_out, notes)


def check_segmentation_splits(
    setting: Setting, config: PixelLabelsConfig
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
        check_range(reader[first].mask, len(names), reader.ignore_index, reader.label_name(first))
        places.append(frozenset(reader.name(index) for index in part.tolist()))
    return places[0], places[1]


class _Readers(NamedTuple):
    """Both readers, which are one where pictures are held out, and the pictures of each."""

    train: MaskReader
    val: MaskReader
    learnt: np.ndarray
    scored: np.ndarray
    hold_out: HoldOut | None
    notes: tuple[str, ...]


def _open_readers(
    setting: Setting, config: PixelLabelsConfig, invalid_labels: InvalidLabels
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


def _matched(val: MaskReader, train: MaskReader) -> MaskReader:
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
    return RenumberedMasks(val, ours)


def _checked(
    reader: MaskReader,
    indices: np.ndarray,
    config: PixelLabelsConfig,
    invalid_labels: InvalidLabels,
    class_names: tuple[str, ...],
    binary: bool | None,
    progress: Progress | None,
) -> CheckedMasks:
    names = _class_names(reader, config, class_names)
    if binary is None:
        binary = _may_be_binary(reader, config, names) and holds_255_alone(reader, indices)
    if binary:
        reader, names = BinaryMasks(reader), names or BINARY_NAMES
    return CheckedMasks(reader, names, binary, indices, invalid_labels, progress)


def _may_be_binary(
    reader: MaskReader, config: PixelLabelsConfig, class_names: tuple[str, ...]
) -> bool:
    """True if nobody said that 255 is void, nor that there are more than two classes."""
    of_folders = reader.ignore_index == BINARY
    return of_folders and config.ignore_index is None and len(class_names) in (0, 2)


def _class_names(
    reader: MaskReader, config: PixelLabelsConfig, class_names: tuple[str, ...]
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
    uri: str, split: Split, config: PixelLabelsConfig, shared: bool
) -> Callable[[InvalidLabels], MaskReader]:
    """Find labelled pixels, and the function that opens them."""

    def instances() -> Callable[[InvalidLabels], MaskReader]:
        found = find_detection(uri, split, shared=shared, need_masks=True)
        return lambda invalid_labels: PaintedInstances(found(invalid_labels, None))

    if uri.endswith(".json"):
        if shared and split == "val":
            raise no_validation(uri)
        return partial(CocoPanoptic, uri) if is_panoptic(uri) else instances()
    pairs = pair_folders(uri)
    ignore_index = BINARY if config.ignore_index is None else config.ignore_index

    def open_pairs(images: str, masks: str) -> Callable[[InvalidLabels], MaskReader]:
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


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
