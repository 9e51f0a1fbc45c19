"""Pictures whose masks were all read once and keep to the classes."""

from __future__ import annotations

import hashlib

import numpy as np

from mimray.trainers.errors import DataError, EmptyDatasetError
from mimray.trainers.evaluation.annotations.base import Fault, InvalidLabels, SegmentationExample
from mimray.trainers.evaluation.annotations.mask_readers import MaskReader, check_range
from mimray.trainers.evaluation.annotations.pictures import TURNED
from mimray.trainers.evaluation.score import Progress

READ_AS_BINARY = "masks of 0 and 255 alone read as two classes, 255 as the second"
UNUSABLE = "masks or pictures that cannot be used"
# Masks with larger values, and no names of classes, number something else.
MOST_UNNAMED = 4096


class CheckedMasks:
    """The pictures of a set that can be read and keep to the classes; each was read once.

    Args:
        reader: pictures and masks.
        class_names: names of the classes, by number; none numbers them by the masks.
        binary: True if 255 was read as class 1, for the counts.
        indices: int64 [N], pictures to check, by their numbers in the reader.
        invalid_labels: collects pictures that cannot be used, or refuses them.
        progress: called with the number of pictures checked.

    Attributes:
        kept: pictures that can be used, by number, each with the classes in its mask.

    Raises:
        DataError: a label is wrong, or there are not two classes.
        EmptyDatasetError: no picture can be used.
    """

    def __init__(
        self,
        reader: MaskReader,
        class_names: tuple[str, ...],
        binary: bool,
        indices: np.ndarray,
        invalid_labels: InvalidLabels,
        progress: Progress | None,
    ) -> None:
        self.uri, self.ignore_index = reader.uri, reader.ignore_index
        self.binary = binary
        self._reader = reader
        self.kept: dict[int, frozenset[int]] = {}
        digest, largest = hashlib.sha256(), -1
        for number, index in enumerate(indices.tolist()):
            try:
                image, mask = reader[index]
                check_range(mask, len(class_names), self.ignore_index, reader.label_name(index))
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
        """Place of a picture."""
        return self.name_of(self._order[index])

    def name_of(self, number: int) -> str:
        """Place of a picture by its number, likewise."""
        return self._reader.name(number)


class PartOfCheckedMasks:
    """Some pictures of a set; their classes are those of the whole.

    Args:
        whole: the set.
        numbers: int64 [N], the pictures' numbers in the reader.

    Raises:
        DataError: every pixel is void.
        EmptyDatasetError: none of the pictures can be used.
    """

    def __init__(self, whole: CheckedMasks, numbers: np.ndarray) -> None:
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
        """Place of a picture."""
        return self._whole.name_of(self._order[index])


def _none_usable(uri: str, hint: str) -> EmptyDatasetError:
    return EmptyDatasetError(f"{uri} holds no picture with a mask that can be used", hint=hint)


def _all_void(uri: str, ignore_index: int) -> DataError:
    return DataError(
        f"every pixel of {uri} is void ({ignore_index})",
        hint="--set ignore_index=… says what is void in index masks",
    )
