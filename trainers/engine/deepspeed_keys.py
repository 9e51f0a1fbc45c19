"""Keys of a raw DeepSpeed block that the installed DeepSpeed does not know."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from mimray.trainers.config.run import Plan
from mimray.trainers.engine.deepspeed import deepspeed_config
from mimray.trainers.errors import ConfigError


def check_known(plan: Plan) -> None:
    """Refuse a raw block with keys or values that DeepSpeed does not know.

    DeepSpeed passes over most unknown keys without a word. It parses the block here, before
    anything runs, and a key that it never asks for is one that it does not know. This imports
    DeepSpeed, if there is a block, so processes that train must not call it first.

    Args:
        plan: the run's plan.

    Raises:
        ConfigError: names every unknown key, or the value that DeepSpeed does not take.
    """
    block = plan.recipe.engine.deepspeed
    if not block:
        return
    config = deepspeed_config(plan, "fp32")
    # This process is not one of the workers, by whose number DeepSpeed would multiply.
    config["train_batch_size"] = plan.micro_batch_size * plan.accumulation
    recorded = _Recorded(config)
    try:
        _parse(recorded)
    except ValidationError as error:
        raise _refused("; ".join(_shown(item, block) for item in error.errors())) from None
    except Exception as error:  # of any kind, as each of its parsers has its own
        raise _refused(str(error).splitlines()[0] if str(error) else repr(error)) from error
    if unknown := list(recorded.unread()):
        raise _refused(", ".join(f"unknown key '{key}'" for key in unknown))


def _parse(config: _Recorded) -> None:
    before = logging.root.manager.disable
    # It reports which accelerator this process lacks.
    logging.disable(max(before, logging.WARNING))
    try:
        from deepspeed.runtime.config import DeepSpeedConfig

        DeepSpeedConfig(config)
    finally:
        logging.disable(before)


class _Recorded(dict[str, Any]):
    """A nested dictionary that knows which of its keys have been asked for."""

    def __init__(self, tree: dict[str, Any]) -> None:
        super().__init__(
            (key, _Recorded(value) if isinstance(value, dict) else value)
            for key, value in tree.items()
        )
        self._read: set[object] = set()

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._read.add(key)
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        self._read.add(key)
        return super().pop(key, *default)

    def keys(self) -> Any:
        return self  # whose `in` and iteration are recorded

    def __iter__(self) -> Iterator[str]:
        for key in list(super().__iter__()):  # as for **arguments, whose receiver refuses others
            self._read.add(key)
            yield key

    def items(self) -> Any:
        self._read.update(super().__iter__())
        return super().items()

    def __copy__(self) -> _Recorded:
        return self

    def unread(self, prefix: str = "") -> Iterator[str]:
        """Dotted keys that were never asked for."""
        for key, value in super().items():
            if key not in self._read:
                yield f"{prefix}{key}"
            # A block of which no key was read went to pydantic, which refuses unknown ones.
            elif isinstance(value, _Recorded) and value._read:
                yield from value.unread(f"{prefix}{key}.")


def _shown(item: Any, block: Mapping[str, Any]) -> str:
    named = ".".join(map(str, item["loc"]))  # within the part of the block that pydantic got
    key = next((k for k in _dotted(block) if f".{k}".endswith(f".{named}")), named)
    if item["type"] == "extra_forbidden":
        return f"unknown key '{key}'"
    return f"'{key}' is {item['input']!r}: {item['msg'][:1].lower()}{item['msg'][1:]}"


def _dotted(block: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in block.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")


def _refused(what: str) -> ConfigError:
    return ConfigError(
        f"engine.deepspeed: {what}",
        hint="keys are those of DeepSpeed's configuration, https://www.deepspeed.ai/docs/config-json",
    )
