"""`mimray keys list`: an endpoint's API keys without their secrets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mimray.serving.api.keys import default_file, read_keys


def known_keys(file: Path | None) -> list[dict[str, Any]]:
    """The keys in a file, the default one without a name, each without its hash."""
    return [key.model_dump(exclude={"sha256"}) for key in read_keys(file or default_file())]


def keys_table(keys: Sequence[dict[str, Any]]) -> str:
    """A line a key: name, date, limit."""
    lines = []
    for key in keys:
        rate = key["pictures_per_minute"]
        limit = f"{rate} pictures a minute" if rate else "no limit"
        lines.append(f"{key['name']:24} {key['created']:28} {limit}")
    return "\n".join(lines)
