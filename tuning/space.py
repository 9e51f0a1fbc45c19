"""The trials of a search space, in order, each checked before it starts.

Random values are a pure function of the seed and the trial's number, so that a sweep that is
started again tries the same.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mimray.trainers.data.rng import Stream, generator
from mimray.trainers.errors import ConfigError
from mimray.tuning.bases import Bases, Params, check_owned
from mimray.tuning.config import (
    METHOD,
    Choice,
    Domain,
    Grid,
    Int,
    LogUniform,
    SweepConfig,
    Uniform,
)

# Keys that must be alike in all trials, or change nothing that is learnt.
_FIXED = {
    "optim.steps": "trials of unlike length cannot be ranked; budget.steps sets it for all",
    "optim.epochs": "trials of unlike length cannot be ranked; budget.steps sets it for all",
    "data.stream": "it changes nothing that is learnt",
    "data.limit": "trials on unlike data cannot be ranked; base.set has one value for all",
}
_FIXED_SECTIONS = {
    "resources": "the sweep's own `resources` says what a trial holds",
    "checkpoint": "it changes nothing that is learnt",
    "logging": "it changes nothing that is learnt",
    "about": "it changes nothing that is learnt",
}


def check_space(config: SweepConfig, bases: Bases) -> None:
    """Hold every value of the space against the recipe's schema.

    Each value is tried alone, with every method that is searched, and a grid in every combination.

    Args:
        config: the sweep's configuration.
        bases: the recipes that its trials begin with.

    Raises:
        ConfigError: a value is not allowed, or one of the methods has no such key; the message
            names the key.
    """
    sections = "{choice: [{name: …, …}, …]}"
    methods: list[Params] = [{METHOD: name} for name in config.methods] or [{}]
    for key, domain in config.space.items():
        for name in (key, *_keys_within(domain, key)):
            reason = _FIXED.get(name) or _FIXED_SECTIONS.get(name.partition(".")[0])
            if reason:
                raise ConfigError(f"space.{name} cannot be searched: {reason}")
        cure = f"search whole sections instead of {METHOD}: space.method={sections}"
        check_owned(key, config.methods, "space", cure)
        for method in methods:
            of = "".join(f" of method {name}" for name in method.values())
            for value in _ends(domain):
                bases.recipe({**method, key: value}, f"space.{key}{of}")
    if config.searcher.name == "grid":
        for params in combinations(config):
            shown = ", ".join(f"{key}={value}" for key, value in params.items())
            bases.recipe(params, f"space, {shown}")


def combinations(config: SweepConfig) -> list[Params]:
    """Every combination of the grids, the last key fastest."""
    grids = [d.grid for d in config.space.values() if isinstance(d, Grid)]
    return [dict(zip(config.space, values, strict=True)) for values in itertools.product(*grids)]


def drawn(config: SweepConfig, number: int) -> Params:
    """The values of a random trial.

    Args:
        config: the sweep's configuration.
        number: the trial's number.
    """
    rng = generator(config.seed, Stream.SEARCH, number)
    return {key: _draw(domain, rng) for key, domain in config.space.items()}


def listed(config: SweepConfig) -> list[Params] | None:
    """All trials in their order, where the searcher knows them beforehand; else None."""
    if config.searcher.name == "grid":
        found = combinations(config)
        return found[: config.budget.trials]
    if config.searcher.name == "random":
        assert config.budget.trials is not None
        return [drawn(config, number) for number in range(config.budget.trials)]
    return None


def num_trials(config: SweepConfig) -> int | None:
    """Trials in the whole sweep; None where only another budget ends it."""
    trials = listed(config)
    return config.budget.trials if trials is None else len(trials)


def space_digest(config: SweepConfig) -> str:
    """A digest of the space, which does not depend on the searcher."""
    tree = {key: domain.model_dump(mode="json") for key, domain in config.space.items()}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def _keys_within(domain: Domain, key: str) -> list[str]:
    """Keys that values of a domain set where they are mappings: `optim.steps` within `optim`."""
    mappings = [value for value in _ends(domain) if isinstance(value, Mapping)]
    return [f"{key}.{name}" for value in mappings for name in value]


def word_of(value: Any) -> Any:
    """A value as Optuna and TensorBoard keep it: lists and mappings as JSON."""
    return json.dumps(value) if isinstance(value, tuple | list | dict) else value


def _ends(domain: Domain) -> tuple[Any, ...]:
    """The values of a domain to check: all of a list, both ends of a range."""
    [values] = (getattr(domain, name) for name in type(domain).model_fields)
    return tuple(values)


def _draw(domain: Domain, rng: np.random.Generator) -> Any:
    match domain:
        case Choice():
            return domain.choice[int(rng.integers(len(domain.choice)))]
        case Uniform():
            return float(rng.uniform(*domain.uniform))
        case LogUniform():
            low, high = domain.loguniform
            return math.exp(rng.uniform(math.log(low), math.log(high)))
        case Int():
            return int(rng.integers(domain.int[0], domain.int[1], endpoint=True))
        case Grid():
            raise AssertionError("grids are not drawn from")
