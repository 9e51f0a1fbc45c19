"""Plan of an ingest: files or row groups, listed up front, read by the workers."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from mimray.trainers.data.account import Account
from mimray.trainers.data.discover import Contents, survey
from mimray.trainers.data.files import (
    is_file,
    is_parquet,
    is_picture,
    join,
    locate,
    parent,
    read_bytes,
    split_options,
)
from mimray.trainers.data.label_tables import folder_labels
from mimray.trainers.data.labels import Classes, numbered, read_values, renumber
from mimray.trainers.data.manifest import read_manifest
from mimray.trainers.data.parquet import Layout, ParquetSource, leaf
from mimray.trainers.data.rng import Stream, generator, permutation
from mimray.trainers.errors import DataError, EmptyDatasetError

# A constant, so that the same source makes the same bytes.
_ORDER_SEED = 0

# One unit is read at once: a picture file (`group` null) or a row group of Parquet.
UNITS = pa.schema(
    [
        ("uri", pa.string()),  # absolute
        ("source", pa.string()),  # relative, so that moving the data changes nothing
        ("label", pa.int64()),
        ("group", pa.int32()),
        ("first_row", pa.int64()),  # of the group, in its file
        ("num_rows", pa.int64()),
    ]
)


class SourcePicture(NamedTuple):
    """One picture as found, or why it could not be read.

    Attributes:
        source: place of the picture, relative to the dataset.
        label: class, or None.
        data: encoded bytes; None when they could not be read.
        reason: a short word when `data` is None, e.g. `missing`.
        message: the reason in full, for people.
    """

    source: str
    label: int | None
    data: bytes | None
    reason: str = ""
    message: str = ""


@dataclass(frozen=True)
class IngestPlan:
    """Everything to be read.

    Attributes:
        units: table of schema `UNITS`, in reading order.
        places: int64 [num_pictures], the place in the dataset to come of each picture read; None
            where they are read in the order of their places.
        num_bytes: size of the Parquet files; 0 for pictures that are files.
        num_pictures: number of pictures in the units.
        layout: columns of the Parquet shards; None for files.
        labelled: True if pictures have labels.
        class_names: names of the classes, by label.
        account: what was passed over or merged on the way.
        label_notes: what people need to know of the labels; see `Labelling`.
    """

    units: pa.Table
    places: np.ndarray | None
    num_bytes: int
    num_pictures: int
    layout: Layout | None
    labelled: bool
    class_names: tuple[str, ...]
    account: Account
    label_notes: tuple[str, ...] = ()


def plan_ingest(
    src: str, split: str | None = None, label: str | None = None
) -> dict[str, IngestPlan]:
    """List what an ingest will read, and draw the order of the dataset to come.

    A class has one number in all splits that are read together, though some may lack it.

    The order is a random permutation of all pictures, from a constant seed, so that neighbours in
    a class folder or a sorted file are strangers. What ingest wrote is in random order already,
    and keeps it.

    Args:
        src: folder of pictures, Parquet (file or folder), or a text file with one URI or path
            a line (relative ones are relative to the text file; `#` starts a comment line).
        split: the only split to take; None takes all.
        label: column of the labels, as for `open_source`.

    Returns:
        What to read by split, in order. The key is empty where only one is taken.

    Raises:
        EmptyDatasetError: when there is no picture.
        DataError: when nothing is there, it is none of these, or there is no such column.
    """
    if is_file(src) and not is_parquet(src):
        if label is not None:
            raise DataError(f"{src} is a list of pictures, without a column {label!r}")
        if split is not None:
            raise DataError(f"{src} is a list of pictures, without a split {split!r}")
        return {"": _from_list(src)}
    found = survey(src)
    if split is not None or len(found.files) == 1:
        plans = {"": _plan(src, found.take(found.choose(split)), label)}
    else:
        plans = {name: _plan(src, part, label) for name, part in found.take_all().items()}
    names = _all_names([plan.class_names for plan in plans.values() if plan.class_names])
    for name in names:
        if "\n" in name:
            raise DataError(
                f"{src} has a class {name!r}, whose name has a line break", hint="rename the class"
            )
    return {split: _renumbered(plan, names) for split, plan in plans.items()}


def _all_names(splits: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Names of the classes of all splits, in the order of one that has them all, or else sorted."""
    if len(set(splits)) == 1:
        return splits[0]
    names = set[str]().union(*splits)
    whole = next((split for split in splits if len(split) == len(names)), None)
    return whole or tuple(sorted(names))


def _renumbered(plan: IngestPlan, names: tuple[str, ...]) -> IngestPlan:
    """A plan with the classes of all splits; of numbers without names nothing is known."""
    if plan.class_names in ((), names):
        return plan
    if plan.layout is not None:
        layout = replace(plan.layout, classes=renumber(plan.layout.classes, names))
        return replace(plan, layout=layout, class_names=names)
    numbers = pa.array([names.index(name) for name in plan.class_names], pa.int64())
    column = plan.units.schema.get_field_index("label")
    labels = numbers.take(plan.units["label"].combine_chunks())
    units = plan.units.set_column(column, UNITS.field("label"), labels)
    return replace(plan, units=units, class_names=names)


def _plan(src: str, contents: Contents, label: str | None) -> IngestPlan:
    if contents.kind == "folder":
        labelling = folder_labels(src, contents, label)
        labels = labelling.numbers
        rows = [
            (join(contents.root, f.path), f.path, None if labels is None else _stored(labels[i]))
            for i, f in enumerate(contents.files)
        ]
        plan = _of_files(rows, labelling.class_names, contents.account)
        return replace(plan, label_notes=labelling.notes)

    source = ParquetSource(src, contents, label=label)
    units = []
    for shard in source.shards:
        first_row = 0
        for group, num_rows in enumerate(shard.group_rows):
            uri = join(contents.root, shard.path)
            units.append((uri, shard.path, None, group, first_row, num_rows))
            first_row += num_rows
    labelled = source.labels() is not None
    layout = replace(source.layout, label=source.layout.label if labelled else None)
    if layout.classes.kind == "number":
        # Whole numbers without names are kept as they are: other programs know them as such.
        layout = replace(layout, classes=Classes((), "index"))
    elif labelled:
        layout = replace(layout, classes=layout.classes._replace(names=source.facts.class_names))
    manifest = read_manifest(*locate(contents.root))
    permuted = manifest is not None and manifest.permuted
    return IngestPlan(
        units=_table(units),
        places=None if permuted else _random_order(len(source)),
        num_bytes=source.num_bytes,
        num_pictures=len(source),
        layout=layout,
        labelled=labelled,
        class_names=layout.classes.names if labelled else (),
        account=contents.account,
        label_notes=source.label_notes,
    )


def read_unit(unit: dict[str, object], layout: Layout | None) -> Iterator[SourcePicture]:
    """Read the pictures of one row of `IngestPlan.units`; failures are yielded, not raised."""
    uri, source = str(unit["uri"]), str(unit["source"])
    label = unit["label"]
    assert label is None or isinstance(label, int)
    if layout is not None:
        yield from _read_group(unit, layout)
        return
    try:
        filesystem, path = _locate(uri)
        yield SourcePicture(source, label, read_bytes(filesystem, path))
    except FileNotFoundError as error:
        yield SourcePicture(source, label, None, "missing", str(error))
    except (OSError, DataError) as error:
        yield SourcePicture(source, label, None, "unreadable", str(error))


def _read_group(unit: dict[str, object], layout: Layout) -> Iterator[SourcePicture]:
    group, first_row, num_rows = (int(str(unit[k])) for k in ("group", "first_row", "num_rows"))
    places = [f"{unit['source']}#{first_row + row}" for row in range(num_rows)]
    wanted = [c for c in (layout.image, layout.label, layout.source) if c is not None]
    try:
        filesystem, path = _locate(str(unit["uri"]))
        with filesystem.open_input_file(path) as file:
            table = pq.ParquetFile(file, pre_buffer=True).read_row_group(group, columns=wanted)
    except (OSError, pa.ArrowInvalid) as error:
        for place in places:
            yield SourcePicture(place, None, None, "unreadable", str(error))
        return
    images = leaf(table, layout.image)
    labels = (
        numbered(read_values(leaf(table, layout.label)), layout.classes) if layout.label else None
    )
    sources = leaf(table, layout.source) if layout.source else None
    for row, place in enumerate(places):
        source = sources[row].as_py() if sources is not None else None
        label = _stored(labels[row]) if labels is not None else None
        data = images[row].as_py()
        if data is None:
            yield SourcePicture(source or place, label, None, "empty", "the row holds no bytes")
        else:
            yield SourcePicture(source or place, label, data)


def _stored(label: int) -> int | None:
    """A label as it is written: null for a picture without one."""
    return None if label < 0 else int(label)


@functools.cache
def _bucket(root: str) -> pafs.FileSystem:
    return locate(root)[0]


def _locate(uri: str) -> tuple[pafs.FileSystem, str]:
    """Find a file, asking each bucket only once: that may cost a request to the service."""
    place, options = split_options(uri)
    scheme, separator, path = place.partition("://")
    if scheme not in ("s3", "gs", "gcs"):
        return locate(uri)
    bucket, _, _ = path.partition("/")
    return _bucket(f"{scheme}{separator}{bucket}{options}"), path


def _from_list(src: str) -> IngestPlan:
    filesystem, path = locate(src)
    if is_picture(src):
        raise DataError(f"{src} is one picture", hint="give the folder it lies in")
    try:
        lines = read_bytes(filesystem, path).decode().split("\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{src} is neither Parquet nor a text file of paths",
            hint="give a folder of pictures, Parquet, or a text file with one path or URI a line",
        ) from error
    base = parent(src)
    names = [name for line in lines if (name := line.strip()) and not name.startswith("#")]
    if not names:
        raise EmptyDatasetError(f"{src} names no picture", hint="write one path or URI a line")
    rows: list[tuple[str, str, int | None]] = [
        (name if "://" in name or name.startswith("/") else join(base, name), name, None)
        for name in names
    ]
    return _of_files(rows, (), Account())


def _of_files(
    rows: list[tuple[str, str, int | None]], class_names: tuple[str, ...], account: Account
) -> IngestPlan:
    return IngestPlan(
        units=_table([(*row, None, 0, 1) for row in rows]).take(_random_order(len(rows))),
        places=None,
        num_bytes=0,
        num_pictures=len(rows),
        layout=None,
        labelled=bool(class_names),
        class_names=class_names,
        account=account,
    )


def _random_order(num_pictures: int) -> np.ndarray:
    return permutation(generator(_ORDER_SEED, Stream.INGEST_ORDER, 0), num_pictures)


def _table(rows: Sequence[tuple[object, ...]]) -> pa.Table:
    return pa.table([list(c) for c in zip(*rows, strict=True)] or [[]] * 6, schema=UNITS)
