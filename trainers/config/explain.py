"""Pydantic's validation errors as messages of one line."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from mimray.trainers.errors import ConfigError


def explain(
    error: ValidationError,
    data: Mapping[str, Any],
    origin: str,
    *,
    keys: Sequence[str],
    owners: Mapping[str, Sequence[str]] | None = None,
    hint: str = "see `mimray recipes NAME` for keys",
) -> ConfigError:
    """Turn pydantic's report into one line a person can act on.

    Args:
        error: the error that pydantic raised.
        data: the tree that was validated, to tell keys from union tags.
        origin: the source of the tree, e.g. a recipe's name.
        keys: dotted keys that exist, of which the closest is suggested for an unknown one.
        owners: names of the methods or encoders that have a key, for keys that not all have; keys
            of others are not suggested.
        hint: the place where keys can be looked up.

    Returns:
        An error that names every wrong key, its value and what is allowed.
    """
    lines = []
    for item in error.errors(include_url=False):
        key = _dotted(item["loc"], data)
        if item["type"] == "extra_forbidden":
            lines.append(_unknown(key, data, keys, owners or {}))
        elif item["type"] == "missing":
            lines.append(f"missing key '{key}'")
        elif item["type"] == "value_error":
            said = str(item["ctx"]["error"])
            lines.append(said if not key or said.startswith(f"{key}.") else f"{key}: {said}")
        elif item["type"] in ("union_tag_invalid", "union_tag_not_found"):
            context = item.get("ctx", {})
            lines.append(
                f"'{key}.{str(context.get('discriminator', 'name')).strip(chr(39))}' is "
                f"{context.get('tag', 'missing')!r}, known: {context.get('expected_tags', '?')}"
            )
        else:
            named = f"'{key}'" if key else "the whole"
            lines.append(f"{named} is {_shown(item['input'])}: {_lower_first(item['msg'])}")
    return ConfigError(f"{origin}: " + "; ".join(lines), hint=hint)


def _dotted(loc: Sequence[int | str], data: Any) -> str:
    """The key as the user wrote it, without the union tags that pydantic puts into `loc`."""
    parts: list[str] = []
    node = data
    for i, part in enumerate(loc):
        last = i == len(loc) - 1
        if isinstance(node, Mapping) and part in node:
            parts.append(str(part))
            node = node[part]
        elif isinstance(node, list | tuple) and isinstance(part, int):
            parts.append(str(part))
            node = node[part] if part < len(node) else None
        elif last or not isinstance(node, Mapping):
            parts.append(str(part))
            node = None
    return ".".join(parts)


def _unknown(
    key: str, data: Mapping[str, Any], keys: Sequence[str], owners: Mapping[str, Sequence[str]]
) -> str:
    """The error of a key that is unknown, and the key that may have been meant."""
    if key in owners:
        section = key.split(".")[0]
        chosen = _name_of(data, section)
        return f"'{key}' is no key of {section} {chosen}, only of {_listed(owners[key])}"
    valid = [
        k
        for k in keys
        if k != key and (k not in owners or _name_of(data, k.split(".")[0]) in owners[k])
    ]
    # People mostly mistype or misplace real keys, so one of the same name elsewhere goes first.
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [k for k in valid if k.rsplit(".", 1)[-1] == leaf]
    alike = [k for k in valid if _likeness(leaf, k.rsplit(".", 1)[-1]) >= 0.4]
    close = same_leaf[:1] or difflib.get_close_matches(key, alike, n=1, cutoff=0.6)
    return f"unknown key '{key}'" + (f", did you mean '{close[0]}'?" if close else "")


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _name_of(data: Mapping[str, Any], section: str) -> Any:
    found = data.get(section)
    return found.get("name") if isinstance(found, Mapping) else None


def _listed(names: Sequence[str], most: int = 6) -> str:
    shown = [*names[:most], "others"] if len(names) > most else names
    return ", ".join(shown[:-1]) + " and " * (len(shown) > 1) + shown[-1]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
