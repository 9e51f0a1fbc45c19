"""Pictures in Parquet: a row group is read at a time, never a whole shard for one picture."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mimray.trainers.config.data import CACHE_MIB
from mimray.trainers.data.cache import MEMORY_BYTES, DiskCache, MemoryCache, user_cache
from mimray.trainers.data.discover import Contents
from mimray.trainers.data.files import changed, is_local, is_parquet, join, locate, unreachable
from mimray.trainers.data.labels import (
    Classes,
    Labelling,
    choose_column,
    labelling_of,
    read_values,
)
from mimray.trainers.data.manifest import FORMAT_KEY, Manifest, is_shard_name, read_manifest
from mimray.trainers.data.parts import CACHE_BYTES, cut_groups
from mimray.trainers.errors import DataError, EmptyDatasetError
from mimray.trainers.types import DatasetFacts, Record

# Footers and label columns are small reads that wait on the network.
_NUM_THREADS = 16


@dataclass(frozen=True)
class Layout:
    """Columns of a schema; their paths may reach into a struct.

    Attributes:
        image: the encoded bytes, e.g. `image.bytes`.
        label: column of the labels, or None.
        source: text column of the places that pictures came from, or None.
        classes: classes as far as the schema tells them.
        label_by_default: True if the column of labels is the one taken when none is asked for.
        passed_over: other columns, with the reason why they are not the labels.
    """

    image: str
    label: str | None
    source: str | None
    classes: Classes
    label_by_default: bool = True
    passed_over: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Shard:
    """One Parquet file.

    Attributes:
        path: relative to the dataset's root.
        num_bytes: size of the file.
        footer: metadata of the file, kept so that a read needs no second look at it.
        schema: Arrow schema of the file.
        modified_ns: time of its last change; 0 for a file in a bucket.
    """

    path: str
    num_bytes: int
    footer: pq.FileMetaData
    schema: pa.Schema
    modified_ns: int = 0

    @property
    def group_rows(self) -> list[int]:
        """Rows of each row group."""
        footer = self.footer
        return [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]


@dataclass(frozen=True)
class Part:
    """A stretch of one row group: what is kept of it when it is read.

    Attributes:
        shard: the file.
        group: number of the row group in the file.
        number: number of the row group in the dataset.
        first_row: first row of the part in the row group.
        num_rows: number of its rows.
    """

    shard: Shard
    group: int
    number: int
    first_row: int
    num_rows: int

    @property
    def whole(self) -> Part:
        """The row group as one part."""
        return replace(self, first_row=0, num_rows=self.shard.footer.row_group(self.group).num_rows)


class ParquetSource:
    """Random access to the pictures of a Parquet dataset.

    The fingerprint of an ingested dataset covers every byte of every picture. That of foreign
    Parquet covers the shards' names, sizes, schema, row counts and row group sizes: it is had
    without reading the pictures, and misses an edit that leaves all of these as they were.

    Attributes:
        group_rows: int64 [G], rows of each row group; of its parts, where `shuffled` needs them.
        open_groups: how many of those to keep open at a time, at most.
        reads_per_epoch: mean number of times that a row group is read in an epoch of shuffled
            reading: its parts, if `cache_mib` is at least `enough_cache_mib`.
        enough_cache_mib: the bound of the folder below which parts are dropped while they are in
            use; 0 where none are kept.

    Args:
        uri: place of the data, as the user gave it.
        contents: shards of the dataset.
        label: column of the labels; None for `label`, or the only one that the data calls so.
        with_labels: False reads no labels, whatever there is.
        shuffled: True where rows are read in the order of `SampleOrder`. Foreign Parquet may be
            sorted, so more row groups are then open at a time than memory holds: they are kept
            on local disk; in parts, if they are large and `cache_mib` does not hold them all.
        cache_dir: folder of row groups kept on disk; None for the user's cache folder.
        cache_mib: bound of that folder.
    """

    def __init__(
        self,
        uri: str,
        contents: Contents,
        *,
        label: str | None = None,
        with_labels: bool = True,
        shuffled: bool = False,
        cache_dir: str | None = None,
        cache_mib: int = CACHE_MIB,
    ) -> None:
        self.uri, self._root = uri, contents.root
        self.account = contents.account
        self.shards = read_footers(contents)
        self.layout = common_layout(self.shards, uri, label)
        manifest = _manifest_of(uri, contents, self.shards)
        permuted = manifest is not None and manifest.permuted
        self._parts, self.open_groups = cut_shards(self.shards, spread=shuffled and not permuted)
        self.group_rows = np.array([part.num_rows for part in self._parts], dtype=np.int64)
        self._group_ends = np.cumsum(self.group_rows)
        self.num_bytes = sum(shard.num_bytes for shard in self.shards)
        self._in_parts = self.num_bytes > cache_mib << 20
        num_groups = sum(shard.footer.num_row_groups for shard in self.shards)
        self.reads_per_epoch = len(self._parts) / max(num_groups, 1) if self._in_parts else 1.0
        num_samples = int(self.group_rows.sum())
        if num_samples == 0:
            raise EmptyDatasetError(f"{uri} holds Parquet without a row")
        self._opened_by = -1
        labelling = (
            self._read_labels(label)
            if with_labels
            else Labelling(None, (), ("none were asked for",))
        )
        self._labels = labelling.numbers
        self.label_notes = labelling.notes
        fingerprint = manifest.fingerprint if manifest else _fingerprint(self.shards)
        self.pictures_fingerprint = fingerprint
        if with_labels and not self.layout.label_by_default:
            # The same pictures under other labels are another dataset.
            fingerprint = hashlib.sha256(f"{fingerprint} {label}".encode()).hexdigest()
        self.facts = DatasetFacts(
            uri=uri,
            num_samples=num_samples,
            fingerprint=fingerprint,
            class_names=labelling.class_names,
            kind="parquet",
        )
        remote = not is_local(locate(self._root)[0])
        too_large = shuffled and not permuted and self.num_bytes > MEMORY_BYTES
        needed_bytes = min(self.num_bytes, CACHE_BYTES) if too_large else 0
        self.enough_cache_mib = -(-needed_bytes >> 20)
        self._disk = (
            DiskCache(cache_dir or str(user_cache("row-groups")), cache_mib)
            if remote or too_large
            else None
        )

    def __len__(self) -> int:
        return self.facts.num_samples

    def __getitem__(self, index: int) -> Record:
        part, row = self._find(index)
        self._open()
        if not self._in_parts:
            part, row = part.whole, row + part.first_row
        # A local file may be written again with other pictures of the same sizes.
        key = f"{self.pictures_fingerprint[:16]}-{part.shard.modified_ns:x}-{part.number}"
        if part.num_rows < part.whole.num_rows:
            key += f"-{part.first_row}-{part.num_rows}"
        load: Callable[[], pa.Table] = partial(self._read_part, part)
        if self._disk is not None:
            load = partial(self._disk.get, key, load)
        table = self._memory.get(key, load)
        image = table["image"][row].as_py()
        label = -1 if self._labels is None else int(self._labels[index])
        return Record(image or b"", None if label < 0 else label)

    def labels(self) -> np.ndarray | None:
        """Labels of all pictures; a missing one among others is -1.

        Returns:
            int64 [N], or None when the dataset is unlabelled.
        """
        return self._labels

    def identities(self) -> list[str]:
        """A text a picture that stays the same where the data is moved or ingested.

        The place that it came from, where a column tells; else shard and row.
        """
        places = [
            f"{shard.path}#{row}" for shard in self.shards for row in range(sum(shard.group_rows))
        ]
        if self.layout.source is None:
            return places
        told = [row for part in self._read_column(self.layout.source) for row in part.to_pylist()]
        return [source or place for source, place in zip(told, places, strict=True)]

    def places(self) -> list[str]:
        """URI of the shard, and row, of each picture."""
        return [
            f"{join(self._root, shard.path)}#{row}"
            for shard in self.shards
            for row in range(sum(shard.group_rows))
        ]

    def sizes(self) -> np.ndarray | None:
        """Read the columns `width` and `height`: int64 [N, 2] in pixels, or None without them."""
        if not all({"width", "height"} <= set(shard.schema.names) for shard in self.shards):
            return None
        return np.stack([self._read_integers("width"), self._read_integers("height")], axis=1)

    def name(self, index: int) -> str:
        """Place and origin of a picture, for messages."""
        part, row = self._find(index)
        row += part.first_row
        place = f"{join(self._root, part.shard.path)} row group {part.group} row {row}"
        if self.layout.source is None:
            return place
        self._open()
        table = self._read(part.shard, part.group, [self.layout.source])
        return f"{leaf(table, self.layout.source)[row].as_py()} in {place}"

    def __getstate__(self) -> dict[str, Any]:
        # Filesystem clients and cached tables belong to one process.
        hidden = ("_filesystem", "_path", "_memory")
        return {k: v for k, v in self.__dict__.items() if k not in hidden} | {"_opened_by": -1}

    def _open(self) -> None:
        # A forked worker inherits this object; an S3 client does not survive the fork.
        if self._opened_by != os.getpid():
            self._filesystem, self._path = locate(self._root)
            self._memory = MemoryCache()
            self._opened_by = os.getpid()

    def _find(self, index: int) -> tuple[Part, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        group = int(np.searchsorted(self._group_ends, index, side="right"))
        return self._parts[group], int(index - self._group_ends[group] + self.group_rows[group])

    def _read_part(self, part: Part) -> pa.Table:
        table = self._read(part.shard, part.group, [self.layout.image])
        images = pa.table({"image": leaf(table, self.layout.image)})
        return copied_stretch(images, part.first_row, part.num_rows)

    def _read_column(self, column: str) -> list[pa.ChunkedArray]:
        """A column of each shard, read without the others."""
        self._open()
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            tables = pool.map(lambda shard: self._read(shard, None, [column]), self.shards)
            return [leaf(table, column) for table in tables]

    def _read_integers(self, column: str) -> np.ndarray:
        values = [part.cast(pa.int64()) for part in self._read_column(column)]
        return np.concatenate([pc.fill_null(part, -1).to_numpy() for part in values])

    def _read_labels(self, label: str | None) -> Labelling:
        """The labels; a column that was not asked for and cannot hold them is only named."""
        layout = self.layout
        passed_over = tuple(f"column {column}" for column in layout.passed_over)
        if layout.label is None:
            return Labelling(None, (), passed_over)
        try:
            values = pa.concat_arrays(
                [read_values(part) for part in self._read_column(layout.label)]
            )
        except DataError as error:
            if label is not None:
                raise DataError(f"{self.uri}: column {label} {error.args[0]}") from None
            return Labelling(None, (), (f"column {layout.label} {error.args[0]}", *passed_over))
        found = labelling_of(values, layout.classes)
        if found.numbers is None:
            found = replace(found, notes=(*found.notes, *passed_over))
        return found

    def _read(self, shard: Shard, group: int | None, columns: list[str]) -> pa.Table:
        path = join(self._path, shard.path)
        try:
            with self._filesystem.open_input_file(path) as file:
                if file.size() != shard.num_bytes or _modified_ns(path, shard) != shard.modified_ns:
                    raise changed(join(self._root, shard.path))
                reader = pq.ParquetFile(file, metadata=shard.footer, pre_buffer=True)
                if group is None:
                    return reader.read(columns=columns)
                return reader.read_row_group(group, columns=columns)
        except pa.ArrowInvalid as error:
            raise DataError(f"{path} is damaged: {error}", hint="copy it again") from error
        except OSError as error:
            raise unreachable(join(self._root, shard.path), error) from error


def _modified_ns(path: str, shard: Shard) -> int:
    """Time of a shard's last change by now; 0 for a file in a bucket."""
    return os.stat(path).st_mtime_ns if shard.modified_ns else 0


def read_footers(contents: Contents) -> list[Shard]:
    """Read the footer of every shard, many at a time.

    Raises:
        DataError: when a file is not Parquet or cannot be read.
    """
    filesystem, root = locate(contents.root)
    local = is_local(filesystem)

    def read(path: str, num_bytes: int) -> Shard:
        try:
            modified_ns = os.stat(join(root, path)).st_mtime_ns if local else 0
            with filesystem.open_input_file(join(root, path)) as file:
                reader = pq.ParquetFile(file)
                return Shard(path, num_bytes, reader.metadata, reader.schema_arrow, modified_ns)
        except pa.ArrowInvalid as error:
            raise DataError(
                f"{join(contents.root, path)} is not a whole Parquet file: {error}",
                hint="copy it again, or remove it",
            ) from error
        except OSError as error:
            raise unreachable(join(contents.root, path), error) from error

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return list(pool.map(lambda f: read(f.path, f.num_bytes), contents.files))


def copied_stretch(table: pa.Table, first_row: int, num_rows: int) -> pa.Table:
    """Rows of a table as a copy, for a slice keeps all of it in memory; the table where it is all.

    Chunks stay apart: a row group of more than 2 GiB is no single array of binary.
    """
    if num_rows == len(table):
        return table
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.slice(first_row, num_rows))
    return pa.ipc.open_stream(sink.getvalue()).read_all()


def cut_shards(shards: list[Shard], *, spread: bool) -> tuple[list[Part], int]:
    """Cut the row groups of all shards; see `cut_groups`.

    Returns:
        The parts, in file order, and how many of them are open at a time.
    """
    groups = [(shard, i) for shard in shards for i in range(shard.footer.num_row_groups)]
    facts = [shard.footer.row_group(i) for shard, i in groups]
    rows = np.array([group.num_rows for group in facts], dtype=np.int64)
    sizes = np.array([group.total_byte_size for group in facts], dtype=np.int64)
    num_parts, open_parts = cut_groups(rows, sizes, spread=spread)
    parts = []
    for number, (shard, group) in enumerate(groups):
        ends = (rows[number] * np.arange(num_parts[number] + 1) // num_parts[number]).tolist()
        parts += [Part(shard, group, number, start, end - start) for start, end in pairwise(ends)]
    return parts, open_parts


def common_layout(shards: list[Shard], uri: str, label: str | None = None) -> Layout:
    """Find the layout that all shards share.

    Args:
        shards: shards of one dataset.
        uri: place of the dataset.
        label: column of the labels that is asked for, or None.

    Raises:
        DataError: when a shard has no picture column or the shards disagree.
    """
    first, *others = shards
    layout = find_layout(first.schema, join(uri, first.path), label)
    for shard in others:
        if find_layout(shard.schema, join(uri, shard.path), label) != layout:
            raise DataError(
                f"{shard.path} and {first.path} in {uri} differ in columns or class names",
                hint="keep one dataset a folder",
            )
    return layout


def find_layout(schema: pa.Schema, name: str, label: str | None = None) -> Layout:
    """Find pictures, labels and class names in a schema.

    Pictures are `image`, or else the only column that could hold them: binary, or a struct with
    a binary `bytes` (Hugging Face's layout). `choose_column` chooses the labels.

    Args:
        schema: schema of a shard.
        name: place of the shard, for messages.
        label: column of the labels that is asked for, or None.

    Raises:
        DataError: when no column, or more than one, can be the picture, or the column asked for
            cannot hold labels.
    """
    pictures = {field.name: path for field in schema if (path := _binary_leaf(field))}
    if "image" not in pictures and len(pictures) != 1:
        raise DataError(
            f"{name} has {'several columns' if pictures else 'no column'} that may hold pictures"
            f" (columns: {', '.join(schema.names)})",
            hint="call the column of encoded pictures `image`: binary or struct<bytes, path>",
        )
    column = "image" if "image" in pictures else next(iter(pictures))
    choice = choose_column(schema, label, pictures, name)
    return Layout(
        image=pictures[column],
        label=choice.column,
        source=_source_leaf(schema, column),
        classes=choice.classes,
        label_by_default=choice.default,
        passed_over=choice.passed_over,
    )


def leaf(table: pa.Table, path: str) -> pa.ChunkedArray:
    """Take a column, or with `a.b` a field of a struct column, by its path."""
    if path in table.column_names:
        return table[path]
    name, _, field = path.rpartition(".")
    return pc.struct_field(table[name], field)


def _binary_leaf(field: pa.Field) -> str | None:
    if pa.types.is_struct(field.type):
        index = field.type.get_field_index("bytes")
        if index >= 0 and _is_binary(field.type.field(index).type):
            return f"{field.name}.bytes"
        return None
    return field.name if _is_binary(field.type) else None


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _source_leaf(schema: pa.Schema, image: str) -> str | None:
    if "source" in schema.names and schema.field("source").type == pa.string():
        return "source"
    kind = schema.field(image).type
    if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
        return f"{image}.path"
    return None


def _manifest_of(uri: str, contents: Contents, shards: list[Shard]) -> Manifest | None:
    """Read `dataset.json` and hold it against the shards; None for foreign Parquet and one shard.

    Raises:
        DataError: the dataset is not whole.
    """
    manifest = read_manifest(*locate(contents.root))
    one_shard = is_parquet(uri)
    if manifest is not None and not one_shard:
        if [s.file for s in manifest.shards] != [s.path for s in shards]:
            raise DataError(
                f"{uri}: dataset.json lists {len(manifest.shards)} shards and the folder holds"
                f" {len(shards)}, not the same ones",
                hint="copy the dataset again, or ingest the data again",
            )
        return manifest
    if not one_shard and any(
        is_shard_name(s.path) and FORMAT_KEY in (s.schema.metadata or {}) for s in shards
    ):
        raise DataError(
            f"{uri} was left by an interrupted ingest: it has shards and no dataset.json",
            hint="ingest the data again",
        )
    return None


def _fingerprint(shards: list[Shard]) -> str:
    digest = hashlib.sha256(str(shards[0].schema).encode())
    for shard in shards:
        groups = [shard.footer.row_group(i) for i in range(shard.footer.num_row_groups)]
        sizes = [(group.num_rows, group.total_byte_size) for group in groups]
        digest.update(json.dumps([shard.path, shard.num_bytes, sizes]).encode())
    return digest.hexdigest()
