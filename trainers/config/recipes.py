"""Recipe files: shipped ones by name, a user's own by path, both with overrides."""

from __future__ import annotations

import contextlib
import copy
import difflib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from mimray.trainers.config.run import Recipe, key_owners, parse_recipe
from mimray.trainers.errors import ConfigError

# Assigning a name drops the old one's keys from its section, so names come before keys.
NAMES_FIRST = ("encoder.name", "method.name")


def load_recipe(
    name_or_path: str, overrides: Sequence[str] = (), steps: int | None = None
) -> Recipe:
    """Read a shipped recipe or a file, apply `a.b=c` overrides, and check it.

    Args:
        name_or_path: a shipped recipe's name, e.g. `mae-tiny`, or a path ending in .yaml or .yml.
        overrides: assignments `a.b=c` to dotted keys; values are YAML.
        steps: length of the run in steps, to which the warm-up is scaled; None for the recipe's.

    Raises:
        ConfigError: there is no such recipe, or a key or a value is wrong.
    """
    tree = recipe_tree(name_or_path, steps)
    return parse_recipe(override(tree, overrides), f"recipe {name_or_path}")


def recipe_tree(name_or_path: str, steps: int | None = None) -> dict[str, Any]:
    """A recipe's tree as written, unchecked; arguments and errors are those of `load_recipe`."""
    tree = _read(name_or_path)
    return tree if steps is None else _with_steps(tree, steps, f"recipe {name_or_path}")


def override(tree: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """A recipe's tree with `a.b=c` assignments made; values are YAML.

    Raises:
        ConfigError: an assignment has another form, or a part of its key is a value.
    """
    for assignment in sorted(assignments, key=lambda a: not a.startswith(NAMES_FIRST)):
        tree = _assign(tree, assignment)
    return tree


def shipped_recipes() -> dict[str, Path]:
    """Names of the recipes inside the package, with their files."""
    folder = Path(str(resources.files("mimray.trainers.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def _read(name_or_path: str) -> dict[str, Any]:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(
                f"no recipe file {path}", hint="a path, or a name of `mimray recipes`"
            )
    else:
        known = shipped_recipes()
        if name_or_path not in known:
            close = difflib.get_close_matches(name_or_path, known, n=1)
            suggestion = f", did you mean {close[0]!r}?" if close else ""
            raise ConfigError(
                f"unknown recipe {name_or_path!r}{suggestion}",
                hint="`mimray recipes` lists them; one of your own is a path ending in .yaml",
            )
        path = known[name_or_path]
    return read_tree(path)


def read_tree(path: Path) -> dict[str, Any]:
    """Read the sections of a YAML file, unchecked.

    Raises:
        ConfigError: the file is not YAML, or holds no mapping.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, got {type(tree).__name__}")
    return tree


def _with_steps(tree: dict[str, Any], steps: int, origin: str) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    optim = tree.setdefault("optim", {})
    if not isinstance(optim, dict):
        raise ConfigError(f"{origin}: 'optim' must be a mapping")
    length = optim.pop("epochs", None), optim.pop("steps", None)
    warmup = optim.pop("warmup_epochs", None), optim.pop("warmup_steps", None)
    share = 0.0
    for whole, part in zip(length, warmup, strict=True):
        if whole and part:
            share = part / whole
    optim |= {"steps": steps, "warmup_steps": min(round(steps * share), steps - 1)}
    return tree


def _assign(tree: dict[str, Any], assignment: str) -> dict[str, Any]:
    key, equals, text = assignment.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {assignment!r} is not of the form a.b=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {assignment!r}: the value is not YAML") from None
    if isinstance(value, str):
        # YAML 1.1 reads 1e-4 as text; people mean the number.
        with contextlib.suppress(ValueError):
            value = float(value)
    return assign(tree, key, value)


def assign(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of a recipe's tree with one dotted key set, and the keys that it rules out removed.

    These are the other unit of a length and, after a new name, the old name's keys.

    Raises:
        ConfigError: a part of the key is a value, not a section.
    """
    tree = copy.deepcopy(tree)
    node = tree
    *parents, leaf = key.split(".")
    for parent in parents:
        if node.get(parent) is None:  # left out, or null: a section that is off
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ConfigError(f"{key}: '{parent}' is a value, not a section")
    node[leaf] = value
    for one, other in (("epochs", "steps"), ("warmup_epochs", "warmup_steps")):
        if parents == ["optim"] and leaf in (one, other):
            node.pop(other if leaf == one else one, None)
    kept = {"encoder.name": ("patch_size", "drop_path"), "method.name": ()}.get(key)
    if kept is not None:
        section, owners = parents[0], key_owners()
        kept = tuple(k for k in kept if value in owners.get(f"{section}.{k}", (value,)))
        tree[section] = {k: v for k, v in tree[section].items() if k in kept} | {"name": value}
    return tree
