"""Labels of a folder of pictures: from `metadata.csv` or `.jsonl` beside them, or from folders."""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from mimray.trainers.data.discover import TABLE_NAMES, Contents, FoundTable, class_folders
from mimray.trainers.data.files import locate, read_bytes, unreachable
from mimray.trainers.data.labels import (
    DEFAULT_COLUMN,
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
    wanted = label or DEFAULT_COLUMN
    content, faults = _read_table(table, wanted)
    name = _name(table)
    if FILE_NAME not in content.column_names:
        raise DataError(
            f"{table.uri} has no column {FILE_NAME}, which names the pictures",
            hint=f"columns: {', '.join(content.column_names[:8])}",
        )
    for column in (FILE_NAME, wanted):
        if column in faults:
            raise DataError(f"{table.uri} {faults[column]}")
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


class _Text(NamedTuple):
    """A table of text with the types that its cells have.

    Attributes:
        content: the table.
        faults: what keeps the pictures' names or their labels from being used, by column, as the
            rest of a sentence.
    """

    content: pa.Table
    faults: dict[str, str]


def _read_table(table: FoundTable, label: str) -> _Text:
    filesystem, path = locate(table.uri)
    try:
        text = read_bytes(filesystem, path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{table.uri} is not UTF-8: {error}", hint="save it as UTF-8") from None
    except OSError as error:
        raise unreachable(table.uri, error) from error
    if _name(table).lower().endswith(".jsonl"):
        return _from_lines(text, table.uri, label)
    return _from_csv(text, table.uri, label)


def _from_csv(text: str, uri: str, label: str) -> _Text:
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise DataError(f"{uri} is damaged: {error}", hint="save it as CSV again") from None
    numbers = [number for number, row in enumerate(rows, start=1) if row]
    if not numbers:
        return _Text(pa.table({}), {})
    heads, *cells = (rows[number - 1] for number in numbers)
    for number, row in zip(numbers[1:], cells, strict=True):
        if len(row) != len(heads):
            raise DataError(
                f"{uri} row {number} has {len(row)} cells, its head {len(heads)}",
                hint="cells with commas are quoted",
            )
    columns, faults = dict[str, pa.Array](), dict[str, str]()
    for head, column in zip(
        map(str.strip, heads), list(zip(*cells, strict=True)) or [()] * len(heads), strict=True
    ):
        if head in columns:
            faults[head] = f"has two columns called {head}"
        columns[head] = pa.array(column, pa.string()) if head == FILE_NAME else _typed(column)
        beyond = _beyond_64_bits(column) if head == label else None
        if beyond is not None:
            place = f"row {numbers[beyond + 1]}"
            faults.setdefault(head, f"{place}: {_too_large(head, column[beyond].strip())}")
    return _Text(pa.table(columns), faults)


def _from_lines(text: str, uri: str, label: str) -> _Text:
    rows, numbers, faults = list[dict[str, Any]](), list[int](), dict[str, str]()
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        row, twice = _read_line(line, f"{uri} line {number}")
        rows.append(row)
        numbers.append(number)
        for key in twice:
            faults.setdefault(key, f"line {number} has {key} twice")
    for key in (FILE_NAME, label):
        for number, row in zip(numbers, rows, strict=True):
            if (fault := _value_fault(key, row.get(key))) is not None:
                faults.setdefault(key, f"line {number}: {fault}")
                break
    columns = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row.get(key) for row in rows]
        try:
            found = pa.array(values)
        except (pa.ArrowException, OverflowError, UnicodeError):
            # Values of several types can be no classes, and only the labels need be any.
            found = pa.array([json.dumps(value).encode() for value in values])
        columns[key.encode("utf-8", "backslashreplace").decode()] = found
    return _Text(pa.table(columns), faults)


def _read_line(line: str, place: str) -> tuple[dict[str, Any], list[str]]:
    """The object of one line, and the keys that it has twice."""
    outermost: list[tuple[str, Any]] = []

    def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        outermost[:] = pairs  # The last object to end is the one that holds the others.
        return dict(pairs)

    try:
        row = json.loads(line, object_pairs_hook=keep)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is no JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{place} holds no object")
    counts = Counter(key for key, _ in outermost)
    return row, [key for key, count in counts.items() if count > 1]


def _value_fault(column: str, value: Any) -> str | None:
    """The reason why a value of JSON is no path or label, whatever others there are, if any."""
    if isinstance(value, str):
        return None if _is_unicode(value) else f"column {column} holds text that is not Unicode"
    if column == FILE_NAME and value is not None:
        return f"{FILE_NAME} is {json.dumps(value)[:40]}, which is no path of a picture"
    if isinstance(value, int) and not _fits_64_bits(value):
        return _too_large(column, str(value))
    return None


def _too_large(column: str, number: str) -> str:
    return f"column {column} holds {number[:40]}, a number beyond 64 bits, which is no class"


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _fits_64_bits(number: int) -> bool:
    return -(2**63) <= number < 2**63


def _beyond_64_bits(cells: Sequence[str]) -> int | None:
    """The first cell beyond 64 bits of a column of whole numbers, if there is any."""
    filled = [(row, cell.strip()) for row, cell in enumerate(cells) if cell.strip()]
    if not all(_INTEGER.fullmatch(cell) for _, cell in filled):
        return None
    # Python reads no number of thousands of digits.
    return next((r for r, c in filled if len(c) > 20 or not _fits_64_bits(int(c))), None)


def _typed(cells: tuple[str, ...]) -> pa.Array:
    """A CSV column: whole numbers or floats where all its cells are, else text.

    Numbers with leading zeros, such as `007`, are text.
    """
    cells = tuple(cell.strip() for cell in cells)
    filled = [cell for cell in cells if cell]
    if _beyond_64_bits(cells) is not None:
        return pa.array(cells, pa.string())
    if filled and all(map(_INTEGER.fullmatch, filled)):
        return pa.array([int(cell) if cell else None for cell in cells])
    if filled and all(_INTEGER.fullmatch(c) or _DECIMAL.fullmatch(c) for c in filled):
        return pa.array([float(cell) if cell else None for cell in cells], pa.float64())
    return pa.array(cells, pa.string())


def _name(table: FoundTable) -> str:
    return posixpath.basename(table.uri)
