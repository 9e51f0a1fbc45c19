"""Searched values, scores and times as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mimray.trainers.evaluation.uncertainty import figure_text
from mimray.trainers.redaction import masked

_LONGEST, _TICK = 40, 16


def frozen(value: Any) -> Any:
    """A hashable value; JSON gives lists back for tuples.

    Args:
        value: a searched key's value.

    Returns:
        The value with lists as tuples; a mapping as the text shown of it.
    """
    if isinstance(value, list | tuple):
        return tuple(frozen(item) for item in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return _text(value)


def shown(value: Any) -> str:
    """A searched value in at most 40 characters.

    Args:
        value: a searched key's value.
    """
    return _cut(_text(value), _LONGEST)


def _text(value: Any) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:.4g}"
        case list() | tuple():
            return "(" + ", ".join(map(_text, value)) + ")"
        case Mapping():
            return "{" + ", ".join(f"{key}: {_text(item)}" for key, item in value.items()) + "}"
    return str(value)


def tick(value: Any) -> str:
    """A searched value in at most 16 characters, to fit beside an axis.

    Args:
        value: a searched key's value.
    """
    return _cut(shown(value), _TICK)


def is_number(value: Any) -> bool:
    """True if a value is a finite number, and no boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def distinct(values: Sequence[Any]) -> list[Any]:
    """Each value once: numbers first, ascending, then the rest in the order of their text.

    Args:
        values: hashable values of any types.
    """
    return sorted(
        dict.fromkeys(values),
        key=lambda v: (0, v, "") if is_number(v) else (1 if v is not None else 2, 0, shown(v)),
    )


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key; the whole key where another ends alike or it is `name`.

    Args:
        keys: dotted recipe keys.
    """
    leaves = [key.rpartition(".")[2] for key in keys]
    return {
        key: leaf if leaves.count(leaf) == 1 and leaf != "name" else key
        for key, leaf in zip(keys, leaves, strict=True)
    }


def params_text(params: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """A trial's values in one line.

    Args:
        params: the trial's values by key.
        names: the shown name of each key, from `short_names`.
    """
    return ", ".join(f"{name} {shown(params.get(key))}" for key, name in names.items())


def score_text(score: float | None, standard_error: float | None = None) -> str:
    """A score with four digits, or two from 10 on; a dash for none.

    Args:
        score: the score.
        standard_error: its standard error, where it is known and to be shown.
    """
    if score is None or not math.isfinite(score):
        return "–"
    return figure_text(score, standard_error)


def duration(seconds: float) -> str:
    """A length of time: 42 s, 3 min 10 s, 5 h 2 min."""
    if not math.isfinite(seconds):
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def without_passwords(tree: Any) -> Any:
    """Mask the passwords in a tree's addresses.

    Args:
        tree: dictionaries, sequences and scalars.
    """
    if isinstance(tree, Mapping):
        return {key: without_passwords(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(without_passwords(item) for item in tree)
    return masked(tree) if isinstance(tree, str) else tree


def plain(tree: Any) -> Any:
    """A tree that strict JSON can hold.

    Args:
        tree: dictionaries, sequences and scalars.

    Returns:
        The tree with lists for sequences and None for numbers that are not finite.
    """
    if isinstance(tree, Mapping):
        return {str(key): plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain(item) for item in tree]
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else None
    return tree if tree is None or isinstance(tree, bool | int | str) else str(tree)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
