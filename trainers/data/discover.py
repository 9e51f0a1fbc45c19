"""Contents of a URI: Parquet shards or a tree of pictures, their splits, their classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mimray.trainers.data.files import (
    SPLITS,
    FoundFile,
    is_file,
    is_parquet,
    is_picture,
    join,
    list_files,
    parent,
)
from mimray.trainers.errors import DataError, EmptyDatasetError

VALIDATION_SPLITS = ("val", "valid", "validation", "dev", "test")
"""Held-out splits in the order they are preferred: a test set is kept back where it can be."""

_SPLIT_IN_NAME = re.compile(r"(.+?)-\d{5}-of-\d{5}.*")


@dataclass(frozen=True)
class Contents:
    """The files of one dataset.

    Attributes:
        kind: `parquet` or `folder`.
        root: URI that the files' paths are relative to.
        files: the shards or pictures, sorted by path.
        num_ignored: files passed over: beside Parquet the pictures, beside pictures the rest.
    """

    kind: Literal["parquet", "folder"]
    root: str
    files: tuple[FoundFile, ...]
    num_ignored: int


def discover(uri: str, split: str | None = None) -> Contents:
    """Find the dataset at a URI.

    Parquet wins where a folder holds both. Splits are told by Hugging Face's file names
    (`train-00000-of-00004.parquet`) or by folders called `train`, `val`, `test` and the like.

    Args:
        uri: URI of a Parquet file or a folder.
        split: the split to take; None takes `train` where there are several.

    Raises:
        EmptyDatasetError: when there is neither Parquet nor a picture.
        DataError: when nothing is there or there is no such split.
    """
    files, root = _list(uri)
    parquet = tuple(f for f in files if is_parquet(f.path))
    if parquet:
        splits = [_split_of_shard(f.path) for f in parquet]
        chosen = _choose(splits, split, uri)
        kept = tuple(f for f, s in zip(parquet, splits, strict=True) if s == chosen)
        return Contents("parquet", root, kept, sum(is_picture(f.path) for f in files))

    pictures = tuple(f for f in files if is_picture(f.path))
    if not pictures:
        raise EmptyDatasetError(
            f"{uri} holds no picture and no Parquet file",
            hint="give a folder of pictures (.jpg, .png, ...), a folder of Parquet files, or one",
        )
    num_ignored = len(files) - len(pictures)
    splits = _split_folders(pictures)
    chosen = _choose(splits, split, uri)
    if chosen is not None:
        pictures = tuple(
            FoundFile(f.path.partition("/")[2], f.num_bytes)
            for f, s in zip(pictures, splits, strict=True)
            if s == chosen
        )
        root = join(root, chosen)
    return Contents("folder", root, pictures, num_ignored)


def available_splits(uri: str) -> tuple[str, ...]:
    """Name the splits found at a URI, sorted; empty where the data is not split."""
    files, _ = _list(uri)
    parquet = [f for f in files if is_parquet(f.path)]
    if parquet:
        splits = [_split_of_shard(f.path) for f in parquet]
    else:
        splits = _split_folders([f for f in files if is_picture(f.path)])
    return tuple(sorted({s for s in splits if s is not None}))


def class_folders(files: Sequence[FoundFile]) -> tuple[tuple[str, ...], np.ndarray | None]:
    """Read classes from the first folder of each path, when every picture lies in a folder.

    A single folder that holds everything (`JPEGImages/`) is a place, not a class.

    Returns:
        Sorted class names and an int64 label a file; no names and None where there are none.
    """
    folders = [f.path.partition("/")[0] for f in files if "/" in f.path]
    names = tuple(sorted(set(folders)))
    if len(folders) < len(files) or len(names) < 2:
        return (), None
    number = {name: label for label, name in enumerate(names)}
    return names, np.array([number[folder] for folder in folders], dtype=np.int64)


def _list(uri: str) -> tuple[list[FoundFile], str]:
    if not is_file(uri):
        return list_files(uri), uri
    if not is_parquet(uri):
        raise DataError(
            f"{uri} is a file and not Parquet", hint="give a folder of pictures or Parquet files"
        )
    return list_files(uri), parent(uri)


def _split_of_shard(path: str) -> str | None:
    *folders, name = path.split("/")
    match = _SPLIT_IN_NAME.fullmatch(name)
    if match:
        return match[1]
    return next((folder for folder in folders if folder in SPLITS), None)


def _split_folders(pictures: Sequence[FoundFile]) -> list[str | None]:
    tops = [f.path.partition("/")[0] if "/" in f.path else None for f in pictures]
    # `train/` beside `cats/` is a class that happens to be called so.
    return tops if SPLITS.issuperset(tops) else [None] * len(tops)


def _choose(splits: list[str | None], wanted: str | None, uri: str) -> str | None:
    there = {s for s in splits if s is not None}
    if wanted is not None:
        if wanted in there:
            return wanted
        found = ", ".join(sorted(there)) or "none"
        raise DataError(f"{uri} has no split {wanted!r}", hint=f"splits found: {found}")
    if len(set(splits)) == 1:
        return splits[0]
    if "train" in there:
        return "train"
    raise DataError(
        f"{uri} holds several splits and none is called train",
        hint=f"name one of: {', '.join(sorted(there))}",
    )
