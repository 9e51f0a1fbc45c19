"""The labelled pictures an evaluation learns from, and those it scores on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mimray.trainers.data.discover import available_splits
from mimray.trainers.data.hold_out import (
    HoldOut,
    choose,
    hold_out_note,
    validation_split,
)
from mimray.trainers.data.labels import listed
from mimray.trainers.data.selection import Selection, labels_of
from mimray.trainers.data.sources import Source, open_source
from mimray.trainers.data.splits import preferred_validation, split_role
from mimray.trainers.errors import DataError
from mimray.trainers.evaluation.score import Setting


@dataclass(frozen=True)
class Splits:
    """Two labelled sources.

    Attributes:
        train: pictures to learn from; their labels number the classes.
        val: pictures to score on.
        class_names: names of the classes, by label: those of `train`, then those that only `val`
            has.
        val_numbers: int64, the class of each label of `val`, which may lack classes and so number
            the others differently.
        hold_out: the rule by which `val` was held out of the training pictures; None where it has
            a place of its own.
        whole_fingerprint: fingerprint of the pictures that `val` was held out of; empty likewise.
        notes: what people need to know: pictures held out, classes that cannot be learnt, labels.
    """

    train: Source
    val: Source
    class_names: tuple[str, ...]
    val_numbers: np.ndarray
    hold_out: HoldOut | None = None
    whole_fingerprint: str = ""
    notes: tuple[str, ...] = ()

    @property
    def learnt_names(self) -> tuple[str, ...]:
        """Names of the classes that can be learnt, by label."""
        return self.train.facts.class_names


def open_splits(setting: Setting) -> Splits:
    """Open the training and the validation pictures of a labelled dataset.

    Where the data has no split to score on, pictures are held out of it.

    Raises:
        DataError: a set has no labels, no class to score on is one to learn from, or its name
            differs from one in nothing but case.
        EmptyDatasetError: a set has no picture.
    """
    whole = open_source(setting.data, label=setting.label)
    split = validation_split(setting.data) if setting.val is None else None
    if setting.val or split:
        val = open_source(setting.val or setting.data, split=split, label=setting.label)
        return _matched(Splits(whole, _part(val, setting), (), np.zeros(0, dtype=np.int64)))
    learnt, held = choose(whole.identities(), setting.hold_out, labels_of(whole))
    if not len(held):
        raise DataError(
            f"{setting.data} has no validation or test split, and no class with two pictures, of "
            "which one could be held out",
            hint="name pictures to score on with --val",
        )
    return _matched(
        Splits(
            Selection(whole, learnt),
            _part(Selection(whole, held), setting),
            (),
            np.zeros(0, dtype=np.int64),
            hold_out=setting.hold_out,
            whole_fingerprint=whole.pictures_fingerprint,
            notes=(hold_out_note(len(held), len(whole), setting.hold_out, by_class=True),),
        )
    )


def _matched(splits: Splits) -> Splits:
    """Splits with the classes of both sources brought together, by name."""
    train, val = splits.train, splits.val
    learnt, counts = (_pictures_a_class(source) for source in (train, val))
    names, val_names = train.facts.class_names, val.facts.class_names
    spelt = {name.casefold(): name for name in names}
    extra = [name for name in val_names if counts[name] and name not in learnt]
    for name in extra:
        other = spelt.get(name.casefold(), name)
        if other != name:
            raise DataError(
                f"{val.facts.uri} has class {name!r}, which {train.facts.uri} calls {other!r}",
                hint="give both the same name",
            )
    notes = list(splits.notes)
    for source in (train, val) if splits.hold_out is None else (train,):
        told = (*source.label_notes, *source.account.warnings())
        notes += [f"{source.facts.uri}: {note}" for note in told]
    notes = list(dict.fromkeys(notes))  # of two splits in one place
    missing = [name for name in val_names if counts[name] and not learnt.get(name)]
    if missing:
        if len(missing) == sum(count > 0 for count in counts.values()):
            raise DataError(
                f"none of the classes of {val.facts.uri} ({listed(tuple(missing))}) is one of "
                f"{train.facts.uri} ({listed(names)})",
                hint="the pictures to score on need the classes of those to learn from",
            )
        num_pictures = sum(counts[name] for name in missing)
        notes.append(
            f"{num_pictures} of {len(val)} pictures to score on count as wrong: there is no "
            f"picture to learn their classes from ({listed(tuple(missing))})"
        )
    known = {name: number for number, name in enumerate((*names, *extra))}
    return replace(
        splits,
        class_names=tuple(known),
        val_numbers=np.array([known.get(name, -1) for name in val_names], dtype=np.int64),
        notes=tuple(notes),
    )


def _pictures_a_class(source: Source) -> dict[str, int]:
    """Number of pictures of each class, by name."""
    labels, names = labels_of(source), source.facts.class_names
    inside = labels[(labels >= 0) & (labels < len(names))]
    return dict(zip(names, np.bincount(inside, minlength=len(names)).tolist(), strict=True))


def pictures_to_score(setting: Setting) -> Source:
    """The pictures of a task that learns nothing; they need no labels.

    Returns:
        The pictures that `--val` names, else the dataset's own validation or test split, else all
        of it.

    Raises:
        DataError: there are no such pictures.
    """
    split = validation_split(setting.data) if setting.val is None else None
    pictures = open_source(setting.val or setting.data, split=split, with_labels=False)
    return _part(pictures, setting, with_labels=False)


def _part(val: Source, setting: Setting, *, with_labels: bool = True) -> Source:
    """The part of the pictures to score on that the setting asks for.

    A dataset with a validation set and a test set has its parts already: the first to choose by,
    the second to report on.
    """
    if setting.part is None:
        return val
    test = _test_beside(setting.data) if setting.val is None else None
    if test is None:
        return Selection(val, setting.part.indices(len(val), val.labels(), val.facts.uri))
    if setting.part.name == "choice":
        return val
    return open_source(setting.data, split=test, label=setting.label, with_labels=with_labels)


def has_test_beside(data: str) -> bool:
    """True if a dataset has a test split beside the one that it is scored on."""
    return _test_beside(data) is not None


def _test_beside(data: str) -> str | None:
    tests = [name for name in available_splits(data) if split_role(name) == "test"]
    test = preferred_validation(tests)
    return test if test != validation_split(data) else None
