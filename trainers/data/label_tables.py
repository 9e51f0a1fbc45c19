"""Labels of a folder of pictures: from `metadata.csv` or `.jsonl` beside them, or from folders."""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re
from typing import Any

import pyarrow as pa

from mimray.trainers.data.discover import TABLE_NAMES, Contents, FoundTable, class_folders
from mimray.trainers.data.files import locate, read_bytes, unreachable
from mimray.trainers.data.labels import (
    Classes,
    Labelling,
    choose_column,
    labelling_of,
    listed,
    odd_names,
    read_values,
)
from mimray.trainers.errors import DataError

FILE_NAME = "file_name"

_INTEGER = re.compile(r"-?(0|[1-9]\d*)")
_DECIMAL = re.compile(r"-?(0|[1-9]\d*)\.\d*([eE][+-]?\d+)?|nan", re.IGNORECASE)


def folder_labels(uri: str, contents: Contents, label: str | None) -> Labelling:
    """Find the labels of a folder of pictures.

    They are a column of the tables beside the pictures, as Hugging Face's `imagefolder` has them:
    `metadata.csv` or `metadata.jsonl` with the picture's path in `file_name`. Without such a column
    the first folder of each path is the class.

    Args:
        uri: place of the dataset, for messages.
        contents: the pictures, and the tables beside them.
        label: column of the labels; None for `label`.

    Raises:
        DataError: the column asked for is in no table or cannot hold labels, or a table is damaged
            or gives a picture two labels.
    """
    named = [t for t in contents.tables if _name(t).lower() in TABLE_NAMES]
    # The tables of deeper folders have the last word.
    named.sort(key=lambda table: (table.folder.count("/") + bool(table.folder), table.uri))
    if label is not None and not named:
        raise DataError(
            f"{uri} has no column {label!r}: it is a folder without {' or '.join(TABLE_NAMES)}",
            hint="without --label its class folders are the labels",
        )
    notes: list[str] = []
    parts = []
    for table in named:
        try:
            found = _read_column(table, label, notes)
        except DataError as error:
            if label is not None:
                raise
            notes.append(error.args[0])
            continue
        if found is not None:
            parts.append((table, *found))
    if parts:
        joined = _joined(contents, parts)
        if joined.numbers is not None or label is not None:
            return joined
        notes += joined.notes
    class_names, numbers = class_folders(contents.files)
    if numbers is None:
        others = sorted({_name(t) for t in contents.tables if t not in named})
        if others and not named:
            notes.append(
                f"{', '.join(others[:3])}: not read; labels are read from {TABLE_NAMES[0]} with "
                f"the columns {FILE_NAME} and label"
            )
        return Labelling(None, (), tuple(notes))
    return Labelling(numbers, class_names, (*notes, *odd_names(class_names)))


def _read_column(
    table: FoundTable, label: str | None, notes: list[str]
) -> tuple[str, list[str], pa.Array] | None:
    """The column of labels of one table: its name, the pictures' names, the values.

    Raises:
        DataError: the table is damaged, or cannot hold the labels that are asked for.
    """
    content = _read_table(table)
    name = _name(table)
    if FILE_NAME not in content.column_names:
        raise DataError(
            f"{table.uri} has no column {FILE_NAME}, which names the pictures",
            hint=f"columns: {', '.join(content.column_names[:8])}",
        )
    choice = choose_column(content.schema, label, (FILE_NAME,), table.uri)
    passed_over = tuple(f"{name}: column {column}" for column in choice.passed_over)
    if choice.column is None:
        notes.append(listed(passed_over) or f"{name} has no column but {FILE_NAME}")
        return None
    try:
        values = read_values(content[choice.column])
    except DataError as error:
        raise DataError(f"{table.uri}: column {choice.column} {error.args[0]}") from None
    return choice.column, content[FILE_NAME].to_pylist(), values


def _joined(
    contents: Contents, parts: list[tuple[FoundTable, str, list[str], pa.Array]]
) -> Labelling:
    """Give each picture the value that a table has for it."""
    index = {file.path: number for number, file in enumerate(contents.files)}
    kinds = {values.type for _, _, _, values in parts}
    text = len(kinds) > 1 or pa.types.is_string(next(iter(kinds)))
    found: list[Any] = [None] * len(index)
    missing: list[str] = []
    for table, column, names, values in parts:
        told: dict[int, Any] = {}
        for name, value in zip(names, values.to_pylist(), strict=True):
            path = table.path_of(name or "")
            if path is None:
                continue
            number = index.get(path)
            if number is None:
                missing.append(path)
                continue
            value = str(value) if text and value is not None else value
            if told.setdefault(number, value) != value:
                raise DataError(
                    f"{table.uri} gives {path} two labels, {told[number]} and {value}, in column "
                    f"{column}",
                    hint="one line a picture",
                )
        for number, value in told.items():
            found[number] = value
    classes = Classes((), "text" if text else "number")
    labelling = labelling_of(pa.array(found, pa.string() if text else pa.int64()), classes)
    notes = list(labelling.notes)
    if missing:
        name = _name(parts[0][0])
        notes.append(
            f"{name} names {len(missing)} pictures that are not there, the first {missing[0]}"
        )
    return Labelling(labelling.numbers, labelling.class_names, tuple(notes), parts[-1][1])


def _read_table(table: FoundTable) -> pa.Table:
    """A table of text with the types that its cells have."""
    filesystem, path = locate(table.uri)
    try:
        text = read_bytes(filesystem, path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{table.uri} is not UTF-8: {error}", hint="save it as UTF-8") from None
    except OSError as error:
        raise unreachable(table.uri, error) from error
    if _name(table).lower().endswith(".jsonl"):
        return _from_lines(text, table.uri)
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    except csv.Error as error:
        raise DataError(f"{table.uri} is damaged: {error}", hint="save it as CSV again") from None
    if not rows:
        return pa.table({})
    heads, *cells = rows
    for number, row in enumerate(cells, start=2):
        if len(row) != len(heads):
            raise DataError(
                f"{table.uri} row {number} has {len(row)} cells, its head {len(heads)}",
                hint="cells with commas are quoted",
            )
    columns = list(zip(*cells, strict=True)) or [()] * len(heads)
    return pa.table(
        {
            head.strip(): pa.array(column, pa.string()) if head == FILE_NAME else _typed(column)
            for head, column in zip(heads, columns, strict=True)
        }
    )


def _from_lines(text: str, uri: str) -> pa.Table:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{uri} line {number} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{uri} line {number} holds no object")
        rows.append(row)
    columns = {}
    for name in dict.fromkeys(key for row in rows for key in row):
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            # Values of several types can be no classes, and only the labels need be any.
            columns[name] = pa.array([json.dumps(value).encode() for value in values])
    return pa.table(columns)


def _typed(cells: tuple[str, ...]) -> pa.Array:
    """A CSV column: whole numbers or floats where all its cells are, else text.

    Numbers with leading zeros, such as `007`, are text.
    """
    cells = tuple(cell.strip() for cell in cells)
    filled = [cell for cell in cells if cell]
    if filled and all(map(_INTEGER.fullmatch, filled)):
        return pa.array([int(cell) if cell else None for cell in cells])
    if filled and all(_INTEGER.fullmatch(c) or _DECIMAL.fullmatch(c) for c in filled):
        return pa.array([float(cell) if cell else None for cell in cells], pa.float64())
    return pa.array(cells, pa.string())


def _name(table: FoundTable) -> str:
    return posixpath.basename(table.uri)
