"""Pictures of a dataset that a run learns from, and their classes."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from mimray.trainers.config.run import Recipe
from mimray.trainers.data.hold_out import HoldOut, choose, validation_split
from mimray.trainers.data.labels import listed
from mimray.trainers.data.sources import Source, open_source
from mimray.trainers.errors import DataError, EmptyDatasetError
from mimray.trainers.types import Record


class Selection:
    """Some pictures of a source; a source itself.

    Args:
        source: the whole.
        indices: int64 [N], ascending: which pictures.
    """

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self._source = source
        self._indices = indices
        ends = np.searchsorted(indices, np.cumsum(source.group_rows))
        rows = np.diff(ends, prepend=0)
        self.group_rows = rows[rows > 0]
        self.open_groups = source.open_groups
        self.reads_per_epoch = source.reads_per_epoch
        self.enough_cache_mib = source.enough_cache_mib
        self.num_bytes = source.num_bytes
        self.label_notes = source.label_notes
        self.account = source.account
        self.pictures_fingerprint = _of_some(source.pictures_fingerprint, indices)
        self.facts = replace(
            source.facts,
            num_samples=len(indices),
            fingerprint=_of_some(source.facts.fingerprint, indices),
        )

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        return self._source[int(self._indices[index])]

    def labels(self) -> np.ndarray | None:
        """Labels of the chosen pictures, int64 [N]; None if unlabelled."""
        labels = self._source.labels()
        return None if labels is None else labels[self._indices]

    def identities(self) -> list[str]:
        """The chosen pictures' texts."""
        whole = self._source.identities()
        return [whole[index] for index in self._indices]

    def places(self) -> list[str]:
        """URIs of the chosen pictures."""
        whole = self._source.places()
        return [whole[index] for index in self._indices]

    def name(self, index: int) -> str:
        """Place of a chosen picture."""
        return self._source.name(int(self._indices[index]))


def _of_some(fingerprint: str, indices: np.ndarray) -> str:
    """The fingerprint of some pictures of a dataset."""
    return hashlib.sha256(fingerprint.encode() + indices.tobytes()).hexdigest()


def evenly_spread(num_samples: int, limit: int | None) -> np.ndarray:
    """Indices of all samples, or of `limit` of them evenly spread; int64, ascending."""
    if limit is None or limit >= num_samples:
        return np.arange(num_samples)
    return np.arange(limit) * num_samples // limit


def open_training(uri: str, recipe: Recipe) -> Source:
    """The pictures that a recipe trains on.

    Args:
        uri: URI of the dataset.
        recipe: `data.val_share` says what is held out where the data has no split to score on,
            `data.limit` how many of the others; where classes are learnt, `data.bad_labels` what
            becomes of pictures without one.

    Raises:
        EmptyDatasetError: no picture is left.
        DataError: the dataset cannot be opened, or classes are to be learnt and it has no labels,
            or one that is outside the range; the picture is named.
    """
    source = open_source(
        uri,
        label=recipe.data.label,
        with_labels=recipe.method.learns_classes or recipe.data.val_share > 0,
        shuffled=True,
        cache_mib=recipe.data.cache_mib,
    )
    indices = np.arange(len(source))
    if recipe.data.val_share > 0 and validation_split(uri) is None:
        rule = HoldOut(recipe.data.val_share, recipe.data.val_seed)
        indices, _ = choose(source.identities(), rule, source.labels())
    indices = indices[evenly_spread(len(indices), recipe.data.limit)]
    if recipe.method.learns_classes:
        num_classes = stated_classes(recipe) or num_classes_of(source)
        skip = recipe.data.bad_labels == "skip"
        indices = labelled(source, indices, num_classes, skip=skip)
    return source if len(indices) == len(source) else Selection(source, indices)


def with_classes(recipe: Recipe, source: Source) -> Recipe:
    """A recipe with `method.num_classes` and `method.class_names` filled in from its data.

    Args:
        recipe: recipe of any method; one that learns no classes stays as it is.
        source: pictures from `open_training`.
    """
    if not recipe.method.learns_classes:
        return recipe
    found = {
        "num_classes": stated_classes(recipe) or num_classes_of(source),
        "class_names": source.facts.class_names,
    }
    return recipe.model_copy(update={"method": recipe.method.model_copy(update=found)})


def stated_classes(recipe: Recipe) -> int:
    """Classes that a recipe says its data has; 0 where it leaves that to the data."""
    return int(getattr(recipe.method, "num_classes", 0))


def labelled(source: Source, indices: np.ndarray, num_classes: int, *, skip: bool) -> np.ndarray:
    """Indices of the pictures that have a class.

    Args:
        source: the dataset.
        indices: int64 [N], which pictures are meant.
        num_classes: classes are 0 to this less one.
        skip: True leaves others out, False refuses them.

    Raises:
        DataError: the dataset has no labels, or a picture has none or one outside the range.
        EmptyDatasetError: no picture is left.
    """
    classes = labels_of(source)[indices]
    good = (classes >= 0) & (classes < num_classes)
    if not good.any():
        raise EmptyDatasetError(f"no picture of {source.facts.uri} has a class")
    kept: np.ndarray = indices[good]
    if good.all() or skip:
        return kept
    bad = indices[~good]
    label = int(classes[~good][0])
    problem = "no label" if label < 0 else f"label {label}, outside 0 to {num_classes - 1}"
    others = f", and so it is with {len(bad) - 1} more" if len(bad) > 1 else ""
    raise DataError(
        f"{source.name(int(bad[0]))} has {problem}{others}",
        hint="correct it, or leave such pictures out: `evaluate --skip-invalid`, "
        "`pretrain --set data.bad_labels=skip`",
    )


def labels_of(source: Source) -> np.ndarray:
    """Labels of all pictures, int64 [N].

    Args:
        source: dataset that must have labels.

    Raises:
        DataError: it has none.
    """
    labels = source.labels()
    if labels is None:
        why = f"; {listed(source.label_notes)}" if source.label_notes else ""
        raise DataError(
            f"{source.facts.uri} has no labels{why}",
            hint="each picture needs a class: a folder a class, a column `label`, or one named by "
            "--label (data.label in recipes)",
        )
    return labels


def num_classes_of(source: Source) -> int:
    """Number of classes of a labelled source: those it names, or up to its largest label."""
    return len(source.facts.class_names) or int(labels_of(source).max()) + 1
