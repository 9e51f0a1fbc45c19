"""Classes of pictures: the column that holds them, and a number for each of its values."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mimray.trainers.data.manifest import CLASS_NAMES_KEY, FORMAT_KEY
from mimray.trainers.errors import DataError

DEFAULT_COLUMN = "label"
_NAMED = 8


class Classes(NamedTuple):
    """The meaning of a column's values.

    Attributes:
        names: names of the classes, by number; empty where they are not known.
        kind: `index` where values are the numbers of classes already; `number` where values are
            whole numbers and the names are these; `text` where values are the names.
        renumbered: the number of each value's class, where an `index` has other ones than these;
            empty otherwise.
    """

    names: tuple[str, ...]
    kind: Literal["index", "number", "text"]
    renumbered: tuple[int, ...] = ()


class Choice(NamedTuple):
    """The column of labels among the columns of a table.

    Attributes:
        column: name of the column; None where no column is taken.
        classes: classes as far as the schema tells them.
        default: True if the column is the one taken when none is asked for.
        passed_over: the other columns, each with its type and the reason.
    """

    column: str | None
    classes: Classes
    default: bool
    passed_over: tuple[str, ...]


@dataclass(frozen=True)
class Labelling:
    """Labels of a dataset's pictures.

    Attributes:
        numbers: int64 [N], classes; -1 for a picture without one. None for an unlabelled dataset.
        class_names: names of the classes, by number; empty when unlabelled.
        column: column that labels are from; None where they are from folders, or there are none.
        notes: what people need to know: columns that were not taken and why, pictures without a
            label, names that are easily mistaken.
    """

    numbers: np.ndarray | None
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    column: str | None = None


def choose_column(
    schema: pa.Schema, wanted: str | None, ignored: Collection[str], name: str
) -> Choice:
    """Choose the column of labels.

    It is the one asked for, else `label`, else the only one that Hugging Face's metadata calls a
    `ClassLabel`.

    Args:
        schema: schema of the table.
        wanted: name of the column that is asked for, or None.
        ignored: columns that hold no labels, such as the pictures.
        name: place of the table, for messages.

    Raises:
        DataError: the column asked for is not there, or its type cannot hold one class a picture.
    """
    metadata = schema.metadata or {}
    known = hugging_face_classes(metadata.get(b"huggingface"))
    # Of our own shards only the column `label` can be meant.
    ours = FORMAT_KEY in metadata
    fields = [f for f in schema if f.name not in ignored and (not ours or f.name == "label")]
    names = [field.name for field in fields]
    default = DEFAULT_COLUMN if DEFAULT_COLUMN in names else None
    if default is None and len(known) == 1:
        default = next(iter(known))
    if wanted is not None and wanted not in names:
        raise DataError(
            f"{name} has no column {wanted!r}",
            hint=f"columns: {', '.join(names[:_NAMED]) or 'none'}",
        )
    column = wanted or default
    fault = None if column is None else type_fault(schema.field(column).type)
    if wanted is not None and fault is not None:
        raise DataError(f"{name}: --label {wanted}: the column {fault}")
    if fault is not None:
        column = None
    passed_over = tuple(
        f"{field.name} ({field.type}): {type_fault(field.type) or f'--label {field.name} takes it'}"
        for field in fields
        if field.name != column
    )
    if column is None:
        return Choice(None, Classes((), "text"), True, passed_over)
    kind: Literal["number", "text"] = "number" if _is_number(schema.field(column).type) else "text"
    classes = Classes((), kind)
    if kind == "number" and metadata.get(CLASS_NAMES_KEY):
        classes = Classes(tuple(metadata[CLASS_NAMES_KEY].decode().split("\n")), "index")
    elif kind == "number" and known.get(column):
        classes = Classes(known[column], "index")
    return Choice(column, classes, column == default, passed_over)


def type_fault(kind: pa.DataType) -> str | None:
    """The reason why a type cannot hold one class a picture; None where it can."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return "holds lists, and only one label a picture is understood"
    if pa.types.is_boolean(kind) or _is_text(kind) or _is_number(kind):
        return None
    if pa.types.is_binary(kind):
        return "holds bytes or values of several types, which are no classes"
    if pa.types.is_null(kind):
        return "holds no value"
    return f"holds {kind}, which is no class"


def read_values(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A column's values as whole numbers or text; what is no label becomes null.

    Null, a negative number and empty text are no label.

    Returns:
        An array of int64 or string.

    Raises:
        DataError: a number that is not whole, as the rest of a sentence about the column.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_boolean(column.type):
        return pc.if_else(column, "True", "False")
    if _is_text(column.type):
        text = column.cast(pa.string())
        return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)
    if not pa.types.is_integer(column.type):
        column = _whole(column.cast(pa.float64()))
    try:
        numbers = column.cast(pa.int64())
    except pa.ArrowInvalid:
        raise DataError("holds numbers beyond 64 bits, which are no classes") from None
    return pc.if_else(pc.less(numbers, 0), pa.scalar(None, pa.int64()), numbers)


def complete(classes: Classes, values: pa.Array) -> Classes:
    """Classes with the names that their values give: those that occur, sorted."""
    if classes.names:
        return classes
    distinct = sorted(pc.unique(values.drop_null()).to_pylist())
    return Classes(tuple(map(str, distinct)), classes.kind)


def numbered(values: pa.Array, classes: Classes) -> np.ndarray:
    """The number of each value's class, int64 [N]; -1 where there is no label."""
    if classes.kind != "index":
        known = map(int, classes.names) if classes.kind == "number" else classes.names
        values = pc.index_in(
            values, value_set=pa.array(list(known), values.type), skip_nulls=True
        ).cast(pa.int64())
    filled: np.ndarray = pc.fill_null(values, -1).to_numpy(zero_copy_only=False)
    if not classes.renumbered:
        return filled
    numbers = np.array((*classes.renumbered, -1), dtype=np.int64)
    # A number that is no class stays none.
    beyond = filled + len(classes.names) - len(classes.renumbered)
    return np.where(
        filled < len(classes.renumbered), numbers[filled.clip(max=len(numbers) - 1)], beyond
    )


def renumber(classes: Classes, names: tuple[str, ...]) -> Classes:
    """The same classes, numbered by the names of more of them."""
    if classes.kind != "index":
        return classes._replace(names=names)
    return Classes(names, "index", tuple(map(names.index, classes.names)))


def labelling_of(values: pa.Array, classes: Classes, notes: tuple[str, ...] = ()) -> Labelling:
    """The labelling that a column's values give.

    Args:
        values: values from `read_values`.
        classes: classes, complete or not.
        notes: notes on how the values were found.
    """
    if values.null_count == len(values):
        return Labelling(None, (), ("the column of labels holds none", *notes))
    classes = complete(classes, values)
    numbers = numbered(values, classes)
    found = [*notes]
    if values.null_count:
        found.append(f"{values.null_count} of {len(values)} pictures have no label")
    found += odd_names(classes.names)
    if classes.kind == "text" and len(classes.names) == len(values) > _NAMED:
        found.append(f"each of {len(values)} pictures has a class of its own: are these classes?")
    return Labelling(numbers, classes.names, tuple(found))


def odd_names(names: tuple[str, ...]) -> list[str]:
    """Notes on names of classes that differ in nothing but case or the spaces around them."""
    seen: dict[str, str] = {}
    notes = []
    for name in names:
        other = seen.setdefault(name.casefold().strip(), name)
        if other != name:
            notes.append(f"classes {other!r} and {name!r} differ in case or spaces only")
    return notes


def listed(columns: tuple[str, ...]) -> str:
    """Columns with their reasons, as part of a sentence."""
    more = f"; and {len(columns) - _NAMED} more" if len(columns) > _NAMED else ""
    return "; ".join(columns[:_NAMED]) + more


def hugging_face_classes(text: bytes | None) -> dict[str, tuple[str, ...]]:
    """Names of the classes of each `ClassLabel` in Hugging Face's metadata of a schema."""
    if text is None:
        return {}
    features = json.loads(text).get("info", {}).get("features", {})
    return {
        name: tuple(feature.get("names") or ())
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }


def _whole(numbers: pa.Array) -> pa.Array:
    """Floats that are whole numbers; NaN, as pandas writes what is missing, becomes null."""
    numbers = pc.if_else(pc.is_nan(numbers), pa.scalar(None, pa.float64()), numbers)
    broken = numbers.filter(pc.not_equal(pc.floor(numbers), numbers))
    infinite = numbers.filter(pc.is_inf(numbers))
    for value in (*broken[:1], *infinite[:1]):
        raise DataError(f"holds {value.as_py()}, which is no class: classes are whole numbers")
    return numbers


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_number(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    )
