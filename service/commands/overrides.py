"""Overrides of a recipe, a task or a sweep, `key=value` each, from options and from values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from mimray.trainers.errors import ConfigError


def assignments(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Values by key as `--set` takes them; paths and the like as text."""
    return tuple(f"{key}={json.dumps(value, default=str)}" for key, value in settings.items())


def with_workers(overrides: Iterable[str], workers: int | None) -> tuple[str, ...]:
    """The overrides of a recipe with `--workers`, which has the last word."""
    last = () if workers is None else (f"resources.num_workers={workers}",)
    return (*overrides, *last)


def with_init(overrides: Iterable[str], init: str | None, partial: bool) -> tuple[str, ...]:
    """The overrides of a recipe with `--init` and `--partial`."""
    if init is not None and not init.strip():
        raise ConfigError("--init names nothing", hint="a bundle, run, name or checkpoint")
    begin = () if init is None else (f"method.init={json.dumps(init)}",)
    return (*overrides, *begin, *(("method.init_partial=true",) if partial else ()))
