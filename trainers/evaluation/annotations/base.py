"""Labelled pictures as tasks read them, and labels that are wrong."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from PIL import Image

from mimray.trainers.data.hold_out import HoldOut
from mimray.trainers.errors import DataError


class SegmentationExample(NamedTuple):
    """A picture and the class of each pixel.

    Attributes:
        image: upright, RGB.
        mask: int64 [h, w]; classes from 0, or the dataset's `ignore_index` for void.
    """

    image: Image.Image
    mask: np.ndarray


class SegmentationSet(Protocol):
    """Pictures with a class for each pixel.

    Attributes:
        uri: URI of the data.
        class_names: names of the classes, by number.
        ignore_index: the value of void pixels, which enter neither loss nor metric.
        binary: True if masks hold 0 and 255 alone, and 255 was read as class 1.
        fingerprint: changes with any picture or label.
    """

    uri: str
    class_names: tuple[str, ...]
    ignore_index: int
    binary: bool
    fingerprint: str

    def __len__(self) -> int:
        """Number of pictures."""
        ...

    def __getitem__(self, index: int) -> SegmentationExample:
        """Read one picture with its labels."""
        ...

    def name(self, index: int) -> str:
        """Place of a picture, for messages."""
        ...


class DetectionExample(NamedTuple):
    """A picture and its objects.

    Attributes:
        image: upright, RGB.
        image_id: the dataset's own number of the picture.
        boxes: float64 [N, 4], (left, top, right, bottom) in pixels.
        labels: int64 [N], classes from 0.
        crowd: bool [N]; crowds (and what is marked difficult) are matched without reward or
            penalty, and never learnt from.
        areas: float64 [N], pixels that an object has; of its mask where there is one.
        masks: bool [N, h, w]; None where the dataset has none.
    """

    image: Image.Image
    image_id: int
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    masks: np.ndarray | None


class DetectionSet(Protocol):
    """Pictures with boxes, perhaps with instance masks.

    Attributes:
        uri: URI of the data.
        class_names: names of the classes, by number.
        has_masks: True if every object has a mask.
        fingerprint: changes with any picture or label.
    """

    uri: str
    class_names: tuple[str, ...]
    has_masks: bool
    fingerprint: str

    def __len__(self) -> int:
        """Number of pictures."""
        ...

    def __getitem__(self, index: int) -> DetectionExample:
        """Read one picture with its labels."""
        ...

    def labels(self, index: int) -> np.ndarray:
        """Classes of a picture's objects without its crowds, int64; reads no picture."""
        ...

    def name(self, index: int) -> str:
        """Place of a picture, for messages."""
        ...


class Fault(NamedTuple):
    """A fault of a label.

    Attributes:
        reason: the kind of fault, by which such labels are counted.
        text: the fault with its values, as the rest of a sentence about the label.
    """

    reason: str
    text: str


@dataclass
class InvalidLabels:
    """Labels that are wrong, and those that were not taken as they stand, counted by reason.

    The first wrong one is an error, unless they are to be left out. What a task does not need, or
    can be taken in one way only, is never an error; it is counted.

    Attributes:
        skip: True leaves wrong labels out and lists them, False refuses them.
        found: a line for each label that was left out, in the order found.
        left_out: number of labels left out, by reason.
        adapted: number of labels passed over or reinterpreted without harm to the task, by reason.
    """

    skip: bool
    found: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    adapted: Counter[str] = field(default_factory=Counter)

    def add(self, where: str, fault: Fault) -> None:
        """Refuse a label, or list it as left out.

        Args:
            where: file and line or id.
            fault: the fault.

        Raises:
            DataError: unless such labels are left out.
        """
        if not self.skip:
            raise DataError(
                f"{where}: {fault.text}", hint="mend it, or leave such out with --skip-invalid"
            )
        self.found.append(f"{where}: {fault.text}")
        self.left_out[fault.reason] += 1

    def adapt(self, reason: str, count: int = 1) -> None:
        """Count labels that were not taken as they stand.

        Args:
            reason: what was found and what became of it, as words before a number.
            count: number of such labels.
        """
        if count:
            self.adapted[reason] += count

    def as_json(self) -> dict[str, dict[str, int]]:
        """The counts, by what became of the labels and by reason."""
        return {"left_out": dict(self.left_out), "adapted": dict(self.adapted)}

    def notes(self, shown: int = 5) -> tuple[str, ...]:
        """Notes for the result: the counts by reason, and the first few labels left out."""
        adapted = tuple(f"{reason}: {count}" for reason, count in self.adapted.items())
        if not self.found:
            return adapted
        reasons = ", ".join(f"{reason}: {count}" for reason, count in self.left_out.items())
        more = len(self.found) - shown
        tail = (f"and {more} more",) if more > 0 else ()
        what = "label" if len(self.found) == 1 else "labels"
        first = f"{len(self.found)} invalid {what} left out ({reasons}):"
        return (*adapted, first, *self.found[:shown], *tail)


Pictures = TypeVar("Pictures")


class LabelledSplits(NamedTuple, Generic[Pictures]):
    """Pictures to learn from and to score on.

    Attributes:
        train: pictures to learn from.
        val: pictures to score on; their classes are those of `train`.
        hold_out: the rule by which these were held out of the former; None where they have a place
            of their own.
        notes: what people need to know of it.
    """

    train: Pictures
    val: Pictures
    hold_out: HoldOut | None
    notes: tuple[str, ...]
