"""The recipes that trials begin with: one for all, or one a method where methods are searched."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mimray.trainers.config.catalogue import METHODS
from mimray.trainers.config.recipes import (
    NAMES_FIRST,
    assign,
    load_recipe,
    recipe_tree,
    shipped_recipes,
)
from mimray.trainers.config.run import Recipe, key_owners, parse_recipe
from mimray.trainers.errors import ConfigError
from mimray.tuning.config import METHOD, BaseConfig, MethodBase, SweepConfig

Params = dict[str, Any]
Tree = dict[str, Any]

# What these keys say must be alike in all trials, or their scores could not be ranked.
_ALIKE = ("limit", "label", "val_share", "val_seed")


@dataclass(frozen=True)
class Bases:
    """The recipes that the trials of a sweep begin with, as trees.

    Attributes:
        common: the base recipe, which says the length and the budget of all trials.
        methods: the recipe of each method that is searched, by its name; empty where none is.
    """

    common: Tree
    methods: Mapping[str, Tree] = field(default_factory=dict)

    def recipe(self, params: Params, origin: str = "trial") -> Recipe:
        """The checked recipe of one trial.

        Args:
            params: recipe keys and the trial's values.
            origin: the recipe's name in errors.

        Raises:
            ConfigError: a key or a value that a recipe does not allow, alone or with the others.
        """
        tree = self.methods.get(params.get(METHOD, ""))
        if tree is None:
            return parse_recipe(_assigned(self.common, params), origin)
        others = {key: value for key, value in params.items() if key != METHOD}
        return parse_recipe(_assigned(tree, others), origin)

    def changed(self, change: Callable[[Tree], Tree]) -> Bases:
        """The same with each tree changed."""
        methods = {name: change(tree) for name, tree in self.methods.items()}
        return Bases(change(self.common), methods)


def with_recipes(config: SweepConfig) -> SweepConfig:
    """A sweep in which each method that is searched has the name of its recipe.

    Raises:
        ConfigError: there is no such method, it is chosen twice, or no shipped recipe goes with the
            base recipe.
    """
    _check_methods(config)
    if not config.methods:
        return config
    origin = f"base {config.base.recipe}"
    common = parse_recipe(_tree(config, config.base.recipe, config.base.set), origin).method.name
    given = {name: config.base.methods.get(name, MethodBase()) for name in config.methods}
    methods = {
        name: own.model_copy(update={"recipe": own.recipe or _beside(config.base, name, common)})
        for name, own in given.items()
    }
    base = config.base.model_copy(update={"methods": methods})
    return config.model_copy(update={"base": base})


def read_bases(config: SweepConfig) -> Bases:
    """The recipes that a sweep's trials begin with, with what the sweep sets in them.

    Args:
        config: the sweep, from `with_recipes`.

    Raises:
        ConfigError: there is no such recipe or key, a recipe is of another method, or recipes
            differ in the pictures that they train on.
    """
    common = _tree(config, config.base.recipe, config.base.set)
    alike = parse_recipe(common, f"base {config.base.recipe}").data
    methods = {name: _of_method(config, name) for name in config.methods}
    for name, tree in methods.items():
        data = parse_recipe(tree).data
        for key in _ALIKE:
            one, other = getattr(data, key), getattr(alike, key)
            if one != other:
                raise ConfigError(
                    f"method {name}: data.{key} is {one!r}, in the base recipe {other!r}; trials "
                    "on unlike data cannot be ranked",
                    hint=f"base.set.data.{key} has one value for all",
                )
    return Bases(common, methods)


def check_owned(key: str, names: Iterable[str], section: str, cure: str) -> None:
    """Refuse a key of the `method` section that one of some methods does not have.

    Args:
        key: a dotted key of a recipe.
        names: the methods' names.
        section: the place of the key in the sweep, for errors.
        cure: what to do about it.

    Raises:
        ConfigError: a method lacks the key; the message names both.
    """
    owners = key_owners().get(key) if key.startswith("method.") else None
    for name in names:
        if owners is not None and name not in owners:
            raise ConfigError(
                f"{section}.{key}: method {name} has no such key, which is one of "
                f"{', '.join(owners)}",
                hint=cure,
            )


def _check_methods(config: SweepConfig) -> None:
    """Refuse names that are no methods, and a method that is chosen twice.

    Recipes of methods that are not searched may stay, so that a space can be made smaller.
    """
    if config.base.methods and not config.methods:
        raise ConfigError(
            f"base.methods goes with space.{METHOD}, which lists the methods",
            hint="leave it out, or search methods",
        )
    named = [(f"space.{METHOD}", name) for name in config.methods]
    for place, name in [*named, *(("base.methods", name) for name in config.base.methods)]:
        if not isinstance(name, str) or name not in METHODS:
            close = difflib.get_close_matches(str(name), METHODS, n=1)
            raise ConfigError(
                f"{place}: {name!r} is no method"
                + (f", did you mean {close[0]!r}?" if close else ""),
                hint=f"known: {', '.join(n for n, m in METHODS.items() if not m.learns_classes)}",
            )
        if METHODS[name].learns_classes:
            raise ConfigError(
                f"{place}: a sweep searches pre-training; {name} has the labels already"
            )
    places = {f"base.set.{key}": key for key in config.base.set}
    places |= {f"space.{key}": key for key in config.space if key != METHOD}
    for name, base in config.base.methods.items():
        places |= {f"base.methods.{name}.set.{key}": key for key in base.set}
    for place, key in places.items():
        if config.methods and key in ("method", METHOD):
            raise ConfigError(
                f"{place} and space.{METHOD} both choose the method", hint="leave one of them out"
            )


def _beside(base: BaseConfig, name: str, common: str) -> str:
    """The shipped recipe of a method that is named as the base recipe, of method `common`, is."""
    if name == common:
        return base.recipe
    beside = base.recipe.replace(common, name, 1) if base.recipe.startswith(f"{common}-") else ""
    if beside in shipped_recipes():
        return beside
    shipped = [one for one in shipped_recipes() if load_recipe(one).method.name == name]
    cause = f"no recipe {beside} is shipped" if beside else f"none is named as {base.recipe} is"
    raise ConfigError(
        f"method {name} needs a recipe to begin with, and {cause}",
        hint=f"--set base.methods.{name}.recipe=NAME"
        + (f", one of {', '.join(shipped)} or your own" if shipped else ", a file of your own"),
    )


def _of_method(config: SweepConfig, name: str) -> Tree:
    """The tree that trials of a method begin with: its recipe, with what all and it alone have."""
    base = config.base
    for key in base.set:
        cure = f"give it to those that have it: base.methods.NAME.set.{key}"
        check_owned(key, [name], "base.set", cure)
    own = base.methods[name]
    tree = _tree(config, own.recipe, {**base.set, **own.set})
    found = parse_recipe(tree, f"method {name}, recipe {own.recipe}").method
    if found.name != name:
        raise ConfigError(
            f"base.methods.{name}.recipe: {own.recipe} is a recipe of {found.name}, not of {name}"
        )
    return tree


def _tree(config: SweepConfig, recipe: str, changes: Params) -> Tree:
    tree = _assigned(recipe_tree(recipe, config.budget.steps), changes)
    return assign(tree, "seed", config.seed)


def _assigned(tree: Tree, params: Mapping[str, Any]) -> Tree:
    for key in sorted(params, key=lambda key: key not in NAMES_FIRST):
        tree = assign(tree, key, _listed(params[key]))
    return tree


def _listed(value: Any) -> Any:
    """A value with lists for tuples, as a recipe's file has it."""
    if isinstance(value, tuple | list):
        return [_listed(item) for item in value]
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return value
