"""Names that people give, which become one folder, one file or one word of a URL."""

from __future__ import annotations

import re

from mimray.trainers.errors import ConfigError

# How a reference to weights begins that timm publishes: `timm:NAME`.
TIMM = "timm:"

# A file system's longest name, in bytes, with room for suffixes.
_MOST_BYTES = 200
_NOT_ALLOWED = re.compile(r"[/\\\x00-\x1f\x7f]")


def check_name(kind: str, name: str) -> None:
    """Refuse a name that is not one segment of a path.

    Args:
        kind: the thing that is named, such as `run`, for the message.
        name: the name as given.

    Raises:
        ConfigError: the name is empty, has a slash, begins with a dot or is too long.
    """
    if (
        not name
        or name.startswith(".")
        or _NOT_ALLOWED.search(name)
        or len(name.encode(errors="surrogateescape")) > _MOST_BYTES
    ):
        raise ConfigError(
            f"{name!r} cannot be the name of a {kind}: it is one folder's name, without slashes, "
            f"not beginning with a dot, of at most {_MOST_BYTES} bytes",
            hint="--storage says which folder it lies in" if "/" in name else "",
        )
