"""Contents of a URI: Parquet shards or a tree of pictures, their splits, their classes."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mimray.trainers.data.account import Account
from mimray.trainers.data.configurations import CARD_NAME, count_merged, refuse_several
from mimray.trainers.data.files import (
    FoundFile,
    is_file,
    is_parquet,
    is_picture,
    is_unreadable_picture,
    join,
    list_files,
    parent,
    suffix,
)
from mimray.trainers.data.manifest import (
    MANIFEST_NAME,
    REJECTED_NAME,
    SPLITS_NAME,
    UNFINISHED_NAME,
)
from mimray.trainers.data.splits import split_of_shard, split_role
from mimray.trainers.errors import DataError, EmptyDatasetError

# Beside pictures: tables that may hold their labels, and those that are read for them.
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
TABLE_NAMES = ("metadata.csv", "metadata.jsonl")
# What an ingest writes beside its shards.
_OURS = frozenset((MANIFEST_NAME, REJECTED_NAME, SPLITS_NAME, UNFINISHED_NAME))


@dataclass(frozen=True)
class Contents:
    """The files of one dataset.

    Attributes:
        kind: `parquet` or `folder`.
        root: URI that the files' paths are relative to.
        files: the shards or pictures, sorted by path.
        account: what was passed over or merged on the way.
        tables: tables beside the pictures, which may hold their labels.
    """

    kind: Literal["parquet", "folder"]
    root: str
    files: tuple[FoundFile, ...]
    account: Account
    tables: tuple[FoundTable, ...] = ()


@dataclass(frozen=True)
class FoundTable:
    """A table of text beside pictures.

    Attributes:
        uri: URI of the file.
        folder: the folder it lies in, relative to the dataset's place; empty for that itself.
        split: the split that is taken of the dataset's place; empty where it has none.
    """

    uri: str
    folder: str
    split: str

    def path_of(self, file_name: str) -> str | None:
        """The path, relative to the dataset's root, of a picture that the table names.

        Returns:
            None for a picture of another split.
        """
        path = posixpath.normpath(posixpath.join(self.folder, file_name.replace("\\", "/")))
        if not self.split:
            return path
        top, _, rest = path.partition("/")
        return rest if top == self.split else None


@dataclass(frozen=True)
class Survey:
    """Everything found at a URI, by split.

    Attributes:
        uri: the place.
        kind: `parquet` or `folder`.
        root: URI that the files' paths are relative to.
        files: the shards or pictures of each split, sorted by path; None is the key of those
            without one.
        account: what was passed over or merged, other splits apart.
        tables: paths of the tables beside the pictures.
    """

    uri: str
    kind: Literal["parquet", "folder"]
    root: str
    files: Mapping[str | None, tuple[FoundFile, ...]]
    account: Account
    tables: tuple[str, ...] = ()

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits as they are found, sorted."""
        return tuple(sorted(split for split in self.files if split is not None))

    def choose(self, wanted: str | None) -> str | None:
        """The split that is meant: `wanted`, or the one to train on.

        Raises:
            DataError: there is no such split, or several.
        """
        if wanted is not None:
            role = split_role(wanted)
            alike = [s for s in self.splits if role is not None and split_role(s) == role]
            if wanted in self.splits or len(alike) == 1:
                return wanted if wanted in self.splits else alike[0]
            found = ", ".join(self.splits) or "none"
            raise DataError(f"{self.uri} has no split {wanted!r}", hint=f"splits found: {found}")
        if len(self.files) == 1:
            return next(iter(self.files))
        train = [split for split in self.splits if split_role(split) == "train"]
        if len(train) == 1:
            return train[0]
        problem = (
            f"several are to train on: {', '.join(train)}" if train else "none is called train"
        )
        raise DataError(
            f"{self.uri} holds several splits and {problem}",
            hint=f"name one of: {', '.join(self.splits)}",
        )

    def take(self, split: str | None) -> Contents:
        """The files of one split, other splits being counted as passed over."""
        account = Account()
        account.merge(self.account)
        for other, files in self.files.items():
            if other != split:
                account.add("other_split", other or "without a split", len(files))
        return self._contents(split, account)

    def take_all(self) -> dict[str, Contents]:
        """The files of every split by its name, in lower case; those without one have no name.

        The accounts of all together count everything once.

        Raises:
            DataError: names of splits differ in case alone.
        """
        account = Account()
        account.merge(self.account)
        if None in self.files and self.splits:
            account.add("other_split", "without a split", len(self.files[None]))
        names: list[str | None] = [*sorted(self.splits, key=str.lower)] or [None]
        parts: dict[str, Contents] = {}
        for name in names:
            key = (name or "").lower()
            if key in parts:
                raise DataError(
                    f"{self.uri} holds the split {key!r} twice, in capitals and not",
                    hint="rename or remove one",
                )
            parts[key] = self._contents(name, Account() if parts else account)
        return parts

    def _contents(self, split: str | None, account: Account) -> Contents:
        files = self.files[split]
        if self.kind == "parquet":
            count_merged([file.path for file in files], account)
        top = files[0].path.partition("/")[0]
        if split != top or not all(file.path.startswith(f"{top}/") for file in files):
            return Contents(self.kind, self.root, files, account, self._tables(""))
        inside = tuple(FoundFile(f.path.partition("/")[2], f.num_bytes) for f in files)
        return Contents(self.kind, join(self.root, top), inside, account, self._tables(top))

    def _tables(self, split: str) -> tuple[FoundTable, ...]:
        return tuple(
            FoundTable(join(self.root, path), posixpath.dirname(path), split)
            for path in self.tables
            if not split or "/" not in path or path.startswith(f"{split}/")
        )


def discover(uri: str, split: str | None = None) -> Contents:
    """Find the dataset at a URI; see `survey`.

    Args:
        uri: URI of a Parquet file or a folder.
        split: the split to take, by its name or another of the same role (`val` for `Valid`);
            None takes the one to train on where there are several.

    Raises:
        EmptyDatasetError: when there is neither Parquet nor a picture.
        DataError: when nothing is there, there is no such split, or the choice is the user's.
    """
    found = survey(uri)
    return found.take(found.choose(split))


def available_splits(uri: str) -> tuple[str, ...]:
    """Name the splits found at a URI, sorted; empty where the data is not split."""
    return survey(uri).splits


def survey(uri: str) -> Survey:
    """Find all that is at a URI.

    Parquet wins where a folder holds both. Splits are told by Hugging Face's file names
    (`train-00000-of-00004.parquet`) or by folders called train, val, test and the like, in any
    case; see `split_role`.

    Raises:
        EmptyDatasetError: when there is neither Parquet nor a picture.
        DataError: when nothing is there, or there are several datasets, or folders of which some
            are called like splits.
    """
    account = Account()
    files, root = _list(uri, account)
    parquet = [file for file in files if is_parquet(file.path)]
    if parquet:
        paths = [file.path for file in parquet]
        refuse_several(root, paths, has_card=any(file.path == CARD_NAME for file in files))
        _count_beside_parquet(files, account)
        ours = {file.path.rpartition("/")[0] for file in files if _is_manifest(file.path)}
        splits = (_top(f) if _top(f) in ours else split_of_shard(f.path) for f in parquet)
        return Survey(uri, "parquet", root, _by(parquet, splits), account)

    pictures = [file for file in files if is_picture(file.path)]
    _count_no_pictures(files, account)
    if not pictures:
        passed = "".join(f"; {line}" for line in account.lines())
        raise EmptyDatasetError(
            f"{uri} holds no picture and no Parquet file{passed}",
            hint="give a folder of pictures (.jpg, .png, ...), a folder of Parquet files, or one",
        )
    tables = [file for file in files if file.path.lower().endswith(TABLE_SUFFIXES)]
    wrapping = _wrapping(pictures)
    root = join(root, wrapping) if wrapping else root
    pictures, tables = _below(wrapping, pictures), _below(wrapping, tables)
    parts = _split_folders(uri, root, pictures, account)
    return Survey(uri, "folder", root, parts, account, tuple(table.path for table in tables))


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


def _list(uri: str, account: Account) -> tuple[list[FoundFile], str]:
    if not is_file(uri):
        return list_files(uri, account), uri
    if not is_parquet(uri):
        raise DataError(
            f"{uri} is a file and not Parquet", hint="give a folder of pictures or Parquet files"
        )
    return list_files(uri), parent(uri)


def _by(
    files: Sequence[FoundFile], splits: Iterable[str | None]
) -> dict[str | None, tuple[FoundFile, ...]]:
    parts: dict[str | None, list[FoundFile]] = {}
    for file, split in zip(files, splits, strict=True):
        parts.setdefault(split, []).append(file)
    return {split: tuple(part) for split, part in parts.items()}


def _count_beside_parquet(files: Sequence[FoundFile], account: Account) -> None:
    for file in files:
        name = posixpath.basename(file.path)
        if is_picture(file.path) or is_unreadable_picture(file.path):
            account.add("beside_parquet", suffix(file.path))
        elif not is_parquet(file.path) and name not in _OURS:
            account.add("not_a_picture", suffix(file.path))


def _count_no_pictures(files: Sequence[FoundFile], account: Account) -> None:
    for file in files:
        if is_picture(file.path):
            continue
        if is_unreadable_picture(file.path):
            account.add("unreadable_format", suffix(file.path))
        elif posixpath.basename(file.path).lower() not in TABLE_NAMES:
            account.add("not_a_picture", suffix(file.path))


def _wrapping(pictures: Sequence[FoundFile]) -> str:
    """The folder that holds all splits, as archives have it; empty where there is none."""
    folder, inside = "", pictures
    while len(tops := {_top(file) for file in inside}) == 1 and None not in tops:
        name = str(*tops)
        if split_role(name):
            return folder
        folder = f"{folder}/{name}" if folder else name
        inside = _below(name, inside)
    return folder if any(top is not None and split_role(top) for top in tops) else ""


def _below(folder: str, files: Sequence[FoundFile]) -> list[FoundFile]:
    if not folder:
        return list(files)
    start = f"{folder}/"
    return [
        FoundFile(file.path.removeprefix(start), file.num_bytes)
        for file in files
        if file.path.startswith(start)
    ]


def _split_folders(
    uri: str, root: str, pictures: Sequence[FoundFile], account: Account
) -> dict[str | None, tuple[FoundFile, ...]]:
    """Part pictures by the folders of splits that they lie in.

    Folders of which some are called like splits are splits where there is one to train on and it
    is clear that it is no class; the others are counted. `train` alone beside class folders is a
    class that happens to be called so. Everything else is for the user to decide.
    """
    sizes = Counter(_top(file) for file in pictures)
    splits = [top for top in sizes if top is not None and split_role(top)]
    others = [top for top in sizes if top not in splits]
    if not splits:
        _refuse_datasets(uri, root, pictures)
        return {None: tuple(pictures)}
    if others:
        roles = {split_role(split) for split in splits}
        nested = all("/" in f.path.partition("/")[2] for f in pictures if _top(f) in splits)
        if "train" in roles and (len(splits) > 1 or nested or others == [None]):
            for other in others:
                account.add("beside_splits", other or "no folder", sizes[other])
        elif roles == {"train"} and len(others) > 1 and None not in others:
            account.add("split_as_class", splits[0])
            return {None: tuple(pictures)}
        else:
            beside = ", ".join(sorted(other or "pictures in none" for other in others)[:4])
            raise DataError(
                f"{uri} has folders called like splits ({', '.join(sorted(splits))}) beside others"
                f" ({beside}), and which are classes cannot be told",
                hint=f"give one of them ({join(root, splits[0])}), put classes below train/ and "
                "test/, or rename a class that is called like a split",
            )
    kept = [file for file in pictures if _top(file) in splits]
    return _by(kept, map(_top, kept))


def _refuse_datasets(uri: str, root: str, pictures: Sequence[FoundFile]) -> None:
    """Refuse folders that each hold splits, which would be taken for classes."""
    roles: dict[str, set[str | None]] = {}
    for file in pictures:
        top, _, rest = file.path.partition("/")
        if "/" in rest:
            roles.setdefault(top, set()).add(split_role(rest.partition("/")[0]))
    several = sorted(top for top, found in roles.items() if {"train"} < found - {None})
    if several:
        raise DataError(
            f"{uri} holds folders with splits of their own: {', '.join(several[:4])}",
            hint=f"give one of them ({join(root, several[0])}), or put the splits at the top",
        )


def _is_manifest(path: str) -> bool:
    return posixpath.basename(path) == MANIFEST_NAME


def _top(file: FoundFile) -> str | None:
    return file.path.partition("/")[0] if "/" in file.path else None
