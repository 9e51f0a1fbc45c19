"""Names of splits: the parts of a dataset to learn from, to choose by and to score on."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
    "unlabeled": ("unlabeled", "unlabelled"),
}
_ROLES = {name: role for role, names in _NAMES.items() for name in names}
SPLITS = frozenset(_ROLES)
VALIDATION_SPLITS = (*_NAMES["val"], *_NAMES["test"])
"""Names of splits to score on, as they are preferred: a test set is kept back where it can be."""

# `train2017`, `test_set`, `val-images`: what people append to the name of a split.
_WORD = "|".join(sorted(SPLITS, key=len, reverse=True))
_FOLDER = re.compile(rf"(?:split=)?({_WORD})(?:[-_ ]?(?:set|split|data|images|imgs|\d{{4}}))?")
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}.*")
_SHARD_STEM = re.compile(rf"(?:.*[-_. ])?({_WORD})(?:[-_. ]?\d+)*")


def split_role(name: str) -> str | None:
    """The role of a folder's or split's name: train, val, test, unlabeled; None for no split.

    Case does not matter: `Training` and `train2017` are train.
    """
    return _ROLES.get(_word(name))


def split_of_shard(path: str) -> str | None:
    """The split that the path of a Parquet file names, or None.

    `train-00000-of-00004.parquet` as Hugging Face writes it; `train.parquet` or
    `cifar_test_0.parquet`; or a folder called like a split. A stem that is called like none
    (`part-00000-of-00004.parquet`) names one only where no folder does.
    """
    *folders, file = path.split("/")
    sharded = _SHARD.fullmatch(file)
    if sharded and split_role(sharded[1]):
        return sharded[1]
    if match := _SHARD_STEM.fullmatch(file.rpartition(".")[0].lower()):
        return match[1]
    folder = next((folder for folder in folders if split_role(folder)), None)
    return folder or (sharded[1] if sharded else None)


def preferred_validation(found: Sequence[str]) -> str | None:
    """The split to score on: a validation split, or else a test split; None for neither."""
    there = [name for name in found if _word(name) in VALIDATION_SPLITS]
    return min(there, key=lambda name: (VALIDATION_SPLITS.index(_word(name)), name), default=None)


def _word(name: str) -> str:
    match = _FOLDER.fullmatch(name.strip().lower())
    return match[1] if match else ""
