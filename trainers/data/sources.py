"""Sources of pictures: one interface over Parquet and plain folders, local or remote."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any, Protocol

import numpy as np

from mimray.trainers.config.data import CACHE_MIB
from mimray.trainers.data.account import Account
from mimray.trainers.data.discover import Contents, available_splits, discover
from mimray.trainers.data.files import absolute, changed, join, locate, read_bytes, unreachable
from mimray.trainers.data.label_tables import folder_labels
from mimray.trainers.data.labels import Labelling
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
        reads_per_epoch: mean number of times that a row group is read in an epoch of training, if
            the cache is large enough.
        enough_cache_mib: the smallest `data.cache_mib` for that; 0 where none is needed.
        num_bytes: size of its files together.
        pictures_fingerprint: the fingerprint that the dataset has when its labels are not read.
        label_notes: what people need to know of the labels: columns that were not taken, with the
            reason; pictures without a label.
        account: what was passed over or merged in finding it.
    """

    facts: DatasetFacts
    group_rows: np.ndarray
    open_groups: int
    reads_per_epoch: float
    enough_cache_mib: int
    num_bytes: int
    pictures_fingerprint: str
    label_notes: tuple[str, ...]
    account: Account

    def __len__(self) -> int:
        """Number of pictures."""
        ...

    def __getitem__(self, index: int) -> Record:
        """Read one picture, still encoded, and its label."""
        ...

    def labels(self) -> np.ndarray | None:
        """Labels of all pictures, int64 [N], without reading a picture; None if unlabelled."""
        ...

    def identities(self) -> list[str]:
        """A text a picture that stays the same where the data is moved or ingested."""
        ...

    def places(self) -> list[str]:
        """The URI of each picture, which tells it from those of any other dataset."""
        ...

    def name(self, index: int) -> str:
        """Place of a picture, for messages."""
        ...


def open_source(
    uri: str,
    *,
    split: str | None = None,
    label: str | None = None,
    with_labels: bool = True,
    shuffled: bool = False,
    cache_dir: str | None = None,
    cache_mib: int = CACHE_MIB,
) -> Source:
    """Open the dataset at a URI.

    Args:
        uri: a Parquet file, a folder of them at any depth, or a folder of pictures; a local
            path or any URI that pyarrow reads (file://, s3://, gs://, hf://).
        split: split to take, where file or folder names tell several apart; None takes `train`.
        label: column of the labels, of Parquet or of `metadata.csv` beside pictures; None takes
            `label`, or class folders.
        with_labels: False reads no labels: the dataset is unlabelled, whatever its labels are like.
        shuffled: True where rows are read in the order of `SampleOrder`; see `ParquetSource`.
        cache_dir: folder on local disk for row groups of remote Parquet; None for the user's cache
            folder. Pictures of a remote folder are not kept: ingest them.
        cache_mib: bound of that folder.

    Raises:
        EmptyDatasetError: when there is no picture.
        DataError: when nothing is there, it is damaged or half written, or the column of labels
            that is asked for cannot be used.
    """
    uri = absolute(uri)
    contents = discover(uri, split)
    if contents.kind == "parquet":
        return ParquetSource(
            uri,
            contents,
            label=label,
            with_labels=with_labels,
            shuffled=shuffled,
            cache_dir=cache_dir,
            cache_mib=cache_mib,
        )
    return FolderSource(uri, contents, label=label, with_labels=with_labels)


class FolderSource:
    """A tree of picture files, with the labels that `folder_labels` finds.

    The fingerprint covers the pictures' relative paths and sizes, not their bytes, so that it
    is had without reading them: a picture edited to exactly the same size goes unnoticed. Labels
    of a table are covered too.

    Args:
        uri: place of the data, as the user gave it.
        contents: pictures of the dataset.
        label: column of the labels in tables beside the pictures, or None.
        with_labels: False reads no labels, whatever there is.
    """

    def __init__(
        self, uri: str, contents: Contents, *, label: str | None = None, with_labels: bool = True
    ) -> None:
        self._root = contents.root
        self.account = contents.account
        self._paths = [file.path for file in contents.files]
        self._sizes = np.array([file.num_bytes for file in contents.files], dtype=np.int64)
        labelling = (
            folder_labels(uri, contents, label)
            if with_labels
            else Labelling(None, (), ("none were asked for",))
        )
        self._labels, self.label_notes = labelling.numbers, labelling.notes
        self.group_rows = np.ones(len(self._paths), dtype=np.int64)
        self.open_groups = len(self._paths)
        self.reads_per_epoch = 1.0
        self.enough_cache_mib = 0
        self.num_bytes = sum(file.num_bytes for file in contents.files)
        digest = hashlib.sha256()
        for file in contents.files:
            digest.update(json.dumps([file.path, file.num_bytes]).encode())
        self.pictures_fingerprint = digest.hexdigest()
        if labelling.column is not None and labelling.numbers is not None:
            digest.update(json.dumps([labelling.class_names, labelling.numbers.tolist()]).encode())
        self.facts = DatasetFacts(
            uri=uri,
            num_samples=len(self._paths),
            fingerprint=digest.hexdigest(),
            class_names=labelling.class_names,
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
        if len(image) != self._sizes[index]:
            raise changed(self.name(index))
        label = -1 if self._labels is None else int(self._labels[index])
        return Record(image, None if label < 0 else label)

    def labels(self) -> np.ndarray | None:
        """Labels by class folder or table, int64 [N], -1 for none; None if unlabelled."""
        return self._labels

    def identities(self) -> list[str]:
        """Paths below the folder."""
        return self._paths

    def places(self) -> list[str]:
        """URIs of the files."""
        return [join(self._root, path) for path in self._paths]

    def name(self, index: int) -> str:
        """Path of a picture."""
        return join(self._root, self._paths[index])

    def __getstate__(self) -> dict[str, Any]:
        hidden = ("_filesystem", "_path")
        return {k: v for k, v in self.__dict__.items() if k not in hidden} | {"_opened_by": -1}
