"""Options that several commands share."""

from __future__ import annotations

import re
import shlex
import sys

import click

from mimray.trainers.errors import ConfigError

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) in pixels from `224` or `192x256`."""
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if match is None:
        raise ConfigError(f"--image-size {text!r} is neither a side nor HEIGHTxWIDTH in pixels")
    return int(match[1]), int(match[2] or match[1])


def command_line() -> str:
    """How this process was called, for the record."""
    return shlex.join(["mimray", *sys.argv[1:]])
