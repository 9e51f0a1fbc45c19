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
    hint: str = "see `mimray recipes NAME` for keys",
) -> ConfigError:
    """Turn pydantic's report into one line a person can act on.

    Args:
        error: the error that pydantic raised.
        data: the tree that was validated, to tell keys from union tags.
        origin: the source of the tree, e.g. a recipe's name.
        keys: dotted keys that exist, of which the closest is suggested for an unknown one.
        hint: the place where keys can be looked up.

    Returns:
        An error that names every wrong key, its value and what is allowed.
    """
    lines = []
    for item in error.errors(include_url=False):
        key = _dotted(item["loc"], data)
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key '{key}'{_suggestion(key, keys)}")
        elif item["type"] == "missing":
            lines.append(f"missing key '{key}'")
        elif item["type"] == "value_error":
            lines.append(f"{key + ': ' if key else ''}{item['ctx']['error']}")
        elif item["type"] in ("union_tag_invalid", "union_tag_not_found"):
            context = item.get("ctx", {})
            lines.append(
                f"'{key}.{str(context.get('discriminator', 'name')).strip(chr(39))}' is "
                f"{context.get('tag', 'missing')!r}, known: {context.get('expected_tags', '?')}"
            )
        else:
            lines.append(f"'{key}' is {_shown(item['input'])}: {_lower_first(item['msg'])}")
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


def _suggestion(key: str, keys: Sequence[str]) -> str:
    # People mostly mistype or misplace real keys, so one of the same name elsewhere goes first.
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [k for k in keys if k.rsplit(".", 1)[-1] == leaf]
    close = same_leaf[:1] or difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    return f", did you mean '{close[0]}'?" if close else ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
