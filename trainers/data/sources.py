"""Sources of pictures: one interface over Parquet and plain folders, local or remote."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any, Protocol

import numpy as np

from mimray.trainers.data.discover import Contents, available_splits, class_folders, discover
from mimray.trainers.data.files import absolute, join, locate, read_bytes, unreachable
from mimray.trainers.data.parquet import ParquetSource
from mimray.trainers.types import DatasetFacts, Record

__all__ = ["FolderSource", "ParquetSource", "Source", "available_splits", "open_source"]


class Source(Protocol):
    """Random access to encoded pictures.

    A source can be pickled and survives a fork: whatever belongs to one process (filesystem
    clients, cached row groups) is made on first use in that process.

    Attributes:
        facts: facts of the dataset.
        group_rows: int64 [G], rows of each row group in file order; reading one picture costs
            reading its row group, unless that is open.
        open_groups: number of row groups to keep open at a time, at most; the same on every
            machine, since the order of training follows from it.
        reads_per_epoch: mean number of times that a row group is read in an epoch of training.
        num_bytes: size of its files together.
    """

    facts: DatasetFacts
    group_rows: np.ndarray
    open_groups: int
    reads_per_epoch: float
    num_bytes: int

    def __len__(self) -> int:
        """Number of pictures."""
        ...

    def __getitem__(self, index: int) -> Record:
        """Read one picture, still encoded, and its label."""
        ...

    def labels(self) -> np.ndarray | None:
        """Labels of all pictures, int64 [N], without reading a picture; None if unlabelled."""
        ...

    def name(self, index: int) -> str:
        """Place of a picture, for messages."""
        ...


def open_source(
    uri: str,
    *,
    split: str | None = None,
    shuffled: bool = False,
    cache_dir: str | None = None,
    cache_mib: int = 4096,
) -> Source:
    """Open the dataset at a URI.

    Args:
        uri: a Parquet file, a folder of them at any depth, or a folder of pictures; a local
            path or any URI that pyarrow reads (file://, s3://, gs://, hf://).
        split: split to take, where file or folder names tell several apart; None takes `train`.
        shuffled: True where rows are read in the order of `SampleOrder`; see `ParquetSource`.
        cache_dir: folder on local disk for row groups of remote Parquet; None for the user's cache
            folder. Pictures of a remote folder are not kept: ingest them.
        cache_mib: bound of that folder.

    Raises:
        EmptyDatasetError: when there is no picture.
        DataError: when nothing is there, or it is damaged or half written.
    """
    uri = absolute(uri)
    contents = discover(uri, split)
    if contents.kind == "parquet":
        return ParquetSource(
            uri, contents, shuffled=shuffled, cache_dir=cache_dir, cache_mib=cache_mib
        )
    return FolderSource(uri, contents)


class FolderSource:
    """A tree of picture files; its first folders are the classes when no picture lies outside.

    The fingerprint covers the pictures' relative paths and sizes, not their bytes, so that it
    is had without reading them: a picture edited to exactly the same size goes unnoticed.

    Args:
        uri: place of the data, as the user gave it.
        contents: pictures of the dataset.
    """

    def __init__(self, uri: str, contents: Contents) -> None:
        self._root = contents.root
        self._paths = [file.path for file in contents.files]
        class_names, self._labels = class_folders(contents.files)
        self.group_rows = np.ones(len(self._paths), dtype=np.int64)
        self.open_groups = len(self._paths)
        self.reads_per_epoch = 1.0
        self.num_bytes = sum(file.num_bytes for file in contents.files)
        digest = hashlib.sha256()
        for file in contents.files:
            digest.update(json.dumps([file.path, file.num_bytes]).encode())
        self.facts = DatasetFacts(
            uri=uri,
            num_samples=len(self._paths),
            fingerprint=digest.hexdigest(),
            class_names=class_names,
            kind="folder",
        )
        self._opened_by = -1

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self._opened_by != os.getpid():  # A forked S3 client would hang.
            self._filesystem, self._path = locate(self._root)
            self._opened_by = os.getpid()
        try:
            image = read_bytes(self._filesystem, join(self._path, self._paths[index]))
        except OSError as error:
            raise unreachable(self.name(index), error) from error
        return Record(image, None if self._labels is None else int(self._labels[index]))

    def labels(self) -> np.ndarray | None:
        """Labels by class folder, int64 [N]; None for a flat folder."""
        return self._labels

    def name(self, index: int) -> str:
        """Path of a picture."""
        return join(self._root, self._paths[index])

    def __getstate__(self) -> dict[str, Any]:
        hidden = ("_filesystem", "_path")
        return {k: v for k, v in self.__dict__.items() if k not in hidden} | {"_opened_by": -1}
