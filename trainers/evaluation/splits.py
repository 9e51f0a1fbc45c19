"""The labelled pictures an evaluation learns from, and those it scores on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mimray.trainers.data.discover import available_splits
from mimray.trainers.data.selection import Selection, labels_of
from mimray.trainers.data.sources import Source, open_source
from mimray.trainers.errors import DataError
from mimray.trainers.evaluation.score import Setting

# In the order they are preferred: a test set is kept back where there is a validation set.
VALIDATION_SPLITS = ("val", "valid", "validation", "dev", "test")
TEST = "test"


@dataclass(frozen=True)
class Splits:
    """Two labelled sources.

    Attributes:
        train: pictures to learn from; their labels number the classes.
        val: pictures to score on.
        class_names: names of the classes, by label; numbers where the data does not name them.
        val_numbers: int64, the class of each label of `val`, which may lack classes and so number
            the others differently.
    """

    train: Source
    val: Source
    class_names: tuple[str, ...]
    val_numbers: np.ndarray


def open_splits(setting: Setting) -> Splits:
    """Open the training and the validation pictures of a labelled dataset.

    Raises:
        DataError: a set has no labels, there is a class to score on that there is none to learn
            from, or there is no validation set.
        EmptyDatasetError: a set has no picture.
    """
    train = open_source(setting.data)
    val = _part(open_source(setting.val) if setting.val else own_validation(setting.data), setting)
    highest = max(int(labels_of(source).max()) for source in (train, val))
    names, val_names = train.facts.class_names, val.facts.class_names
    if bool(names) != bool(val_names):
        named, other = (train, val) if names else (val, train)
        raise DataError(f"{named.facts.uri} names its classes and {other.facts.uri} does not")
    unknown = sorted(set(val_names) - set(names))
    if unknown:
        raise DataError(
            f"{val.facts.uri} has class {unknown[0]!r}, which {train.facts.uri} lacks",
            hint="the pictures to score on need the classes of those to learn from",
        )
    if not names:
        names = val_names = tuple(map(str, range(highest + 1)))
    return Splits(train, val, names, np.array([names.index(name) for name in val_names]))


def pictures_to_score(setting: Setting) -> Source:
    """The pictures of a task that learns nothing; they need no labels.

    Returns:
        The pictures that `--val` names, else the dataset's own validation or test split, else all
        of it.

    Raises:
        DataError: there are no such pictures.
    """
    if setting.val:
        return _part(open_source(setting.val), setting)
    return _part(_own_validation(setting.data) or open_source(setting.data), setting)


def own_validation(data: str) -> Source:
    """The validation split of a dataset, or its test split where it has no other.

    Raises:
        DataError: it has neither.
    """
    source = _own_validation(data)
    if source is None:
        found = ", ".join(available_splits(data)) or "none"
        raise DataError(
            f"{data} has no validation or test split",
            hint=f"splits found: {found}; give one with --val",
        )
    return source


def _part(val: Source, setting: Setting) -> Source:
    """The part of the pictures to score on that the setting asks for.

    A dataset with a validation set and a test set has its parts already: the first to choose by,
    the second to report on.
    """
    if setting.part is None:
        return val
    if setting.val is None and has_test_beside(setting.data):
        return val if setting.part.name == "choice" else open_source(setting.data, split=TEST)
    return Selection(val, setting.part.indices(len(val), val.labels(), val.facts.uri))


def has_test_beside(data: str) -> bool:
    """True if a dataset has a test split beside the one that it is scored on."""
    found = [split for split in VALIDATION_SPLITS if split in available_splits(data)]
    return TEST in found[1:]


def _own_validation(data: str) -> Source | None:
    splits = available_splits(data)
    for split in VALIDATION_SPLITS:
        if split in splits:
            return open_source(data, split=split)
    return None
