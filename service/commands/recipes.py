"""`mimray recipes`: the shipped recipes, listed or resolved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from mimray.trainers.config.recipes import load_recipe, shipped_recipes


def shipped() -> dict[str, dict[str, Any] | None]:
    """The `about` of each shipped recipe, by name; None where it has none."""
    abouts = {name: load_recipe(name).about for name in shipped_recipes()}
    return {name: about.model_dump() if about else None for name, about in abouts.items()}


def resolved(name: str) -> dict[str, Any]:
    """A recipe with every key and default, as a tree."""
    return load_recipe(name).model_dump(mode="json")


def listing(abouts: Mapping[str, Mapping[str, Any] | None]) -> str:
    """Two lines a recipe: its name and summary, its command."""
    width = max(map(len, abouts))
    lines = []
    for name, about in abouts.items():
        lines.append(f"{name:{width}}  {about['summary'] if about else ''}")
        if about:
            lines.append(f"{'':{width}}  {about['command']}")
    return "\n".join(lines)


def as_yaml(tree: Mapping[str, Any]) -> str:
    """A recipe's tree as YAML, in the order of its keys."""
    return yaml.safe_dump(tree, sort_keys=False).rstrip()
