"""Readers of pictures and masks: one a format, and readers over others that change their numbers.

A reader reads a mask when it is asked for, and raises a `DataError` where that is wrong.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from mimray.trainers.errors import DataError
from mimray.trainers.evaluation.annotations.base import DetectionSet, SegmentationExample
from mimray.trainers.evaluation.annotations.panoptic import VOID

# The usual value of void; in masks that hold nothing else but 0 it stands for class 1.
BINARY = 255
BINARY_NAMES = ("0", "255")


class MaskReader(Protocol):
    """Pictures and masks in one format; reading one raises a `DataError` where it is wrong."""

    uri: str
    class_names: tuple[str, ...]
    ignore_index: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> SegmentationExample: ...

    def name(self, index: int) -> str:
        """Place of a picture."""
        ...

    def label_name(self, index: int) -> str:
        """Place of its mask."""
        ...

    def is_turned(self, index: int) -> bool:
        """True if EXIF turns it."""
        ...


class PaintedInstances:
    """Objects painted over each other on a background, class 0; crowds are void.

    Args:
        objects: pictures with labelled objects, which have masks.

    Raises:
        DataError: an object has no mask.
    """

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


class BinaryMasks:
    """Masks of 0 and 255, as programs for painting save them: 255 is class 1, and none is void.

    Args:
        reader: pictures and such masks; reading another mask raises a `DataError`.
    """

    def __init__(self, reader: MaskReader) -> None:
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


class RenumberedMasks:
    """Masks with the class numbers of other pictures, by name; these may have further classes.

    Args:
        reader: pictures and masks with names of their own.
        class_names: the other pictures' classes, by number; they hold all of the reader's.
    """

    def __init__(self, reader: MaskReader, class_names: tuple[str, ...]) -> None:
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
        check_range(mask, len(self._numbers), self.ignore_index, self.label_name(index))
        known = mask != self.ignore_index
        renumbered = mask.copy()
        renumbered[known] = self._numbers[mask[known]]
        return SegmentationExample(image, renumbered)


def _is_binary(mask: np.ndarray) -> bool:
    return bool(((mask == 0) | (mask == BINARY)).all())


def holds_255_alone(reader: MaskReader, indices: np.ndarray) -> bool:
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


def check_range(mask: np.ndarray, num_classes: int, ignore_index: int, where: str) -> None:
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
