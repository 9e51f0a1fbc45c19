"""A sweep held against its data: the plan of every trial, and the keys that stay as they are."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mimray.trainers.config.explain import explain
from mimray.trainers.config.names import check_name
from mimray.trainers.config.recipes import override, read_tree
from mimray.trainers.config.run import (
    OTHER_FORMAT,
    PLAN_FORMAT,
    Plan,
    Recipe,
    parse_recipe,
    resolve,
)
from mimray.trainers.data.files import absolute
from mimray.trainers.data.selection import open_training, with_classes
from mimray.trainers.errors import ConfigError, RunConflictError
from mimray.trainers.methods.needs import with_needs
from mimray.trainers.storage import RunDir
from mimray.trainers.types import DatasetFacts
from mimray.trainers.weights import fetcher
from mimray.tuning.bases import Bases, Params, Tree, read_bases, with_recipes
from mimray.tuning.compute import training_flops
from mimray.tuning.config import METHOD, Asha, SweepConfig
from mimray.tuning.record import SWEEP, SweepRecord, trial_place
from mimray.tuning.score import check_score, metric_of, without_held_out
from mimray.tuning.search import check_storable
from mimray.tuning.space import check_space, listed

# Sections of which the keys are those of a recipe, with dots in them.
_ABOVE_A_KEY = re.compile(r"space\.|base\.set\.|base\.methods\.[^.=]+\.set\.")

# These may differ when a sweep is continued: they change no trial, only the number and the place.
_OPERATIONAL = ("about", "storage", "study", "repeats")
_OPERATIONAL_KEYS = {
    "budget": ("trials", "samples", "hours"),
    "resources": ("cpus_per_worker", "gpus_per_worker", "max_failures"),
}


@dataclass(frozen=True)
class SweepPlan:
    """Everything that a trial depends on beside its own values; sent to every trial's process.

    Attributes:
        uri: the URI of the sweep's directory.
        name: the sweep's name.
        config: the sweep as the user wrote it, with defaults.
        bases: the recipes that trials begin with.
        facts: the dataset trained on.
        rung_samples: pictures seen at each scoring, ascending; the last is a whole trial.
        command: the command line, for the record.
        flops: FLOPs of the base recipe for a picture, where trials are compared at equal FLOPs and
            `rung_samples` are the base recipe's; None where they are compared at equal pictures.
    """

    uri: str
    name: str
    config: SweepConfig
    bases: Bases
    facts: DatasetFacts
    rung_samples: tuple[int, ...]
    command: str
    flops: float | None = None

    @property
    def directory(self) -> RunDir:
        """The sweep's directory."""
        return RunDir(self.uri)

    def trial(self, params: Params) -> Plan:
        """The plan of one trial.

        Raises:
            ConfigError: its values do not fit each other, the data or the workers, or the budget's
                FLOPs are too few for its rungs.
        """
        recipe = self.bases.recipe(params)
        samples = self.rung_samples[-1]
        if self.flops is not None:
            samples = int(samples * self.flops / training_flops(self._resolved(recipe)))
        steps = samples // recipe.optim.batch_size
        if self.flops is not None and steps < len(self.rung_samples):
            shown = ", ".join(f"{key}={value}" for key, value in params.items())
            raise ConfigError(
                f"at the base recipe's FLOPs, {shown} has {steps} steps, fewer than "
                f"{len(self.rung_samples)} rungs",
                hint="a larger budget.steps, or fewer scheduler.num_rungs",
            )
        length = {"optim.steps": steps, **self._warm_up(params, recipe, steps)}
        return self._resolved(self.bases.recipe({**params, **length}))

    def pauses(self, plan: Plan) -> dict[int, int]:
        """The rung at each step at which a trial is scored."""
        whole = self.rung_samples[-1]
        if self.flops is None:
            steps = [samples // plan.global_batch for samples in self.rung_samples[:-1]]
        else:
            shares = enumerate(self.rung_samples[:-1], start=1)
            # At least one step a rung.
            steps = [max(n, plan.steps * samples // whole) for n, samples in shares]
        return {step: rung for rung, step in enumerate([*steps, plan.steps])}

    def methods_text(self) -> list[str]:
        """A line for each method that is searched: its recipe and the length of its trials."""
        return [
            f"method {name}: recipe {self.config.base.methods[name].recipe}, encoder "
            f"{plan.recipe.encoder.name}, {plan.steps} steps of {plan.global_batch} pictures"
            for name in self.bases.methods
            for plan in [self.trial({METHOD: name})]
        ]

    def _warm_up(self, params: Params, recipe: Recipe, steps: int) -> Params:
        """Where methods have recipes of unlike lengths, each keeps its own share of warm-up."""
        if METHOD not in params or any(key.startswith("optim.warmup") for key in params):
            return {}
        own = self._resolved(recipe)
        return {"optim.warmup_steps": min(round(steps * own.warmup_steps / own.steps), steps - 1)}

    def _resolved(self, recipe: Recipe) -> Plan:
        recipe = with_needs(recipe, fetcher(recipe))
        return resolve(recipe, self.facts, self.config.resources.num_workers)


def load_sweep(name_or_path: str, overrides: Sequence[str] = ()) -> SweepConfig:
    """Read a shipped sweep or a file, apply `a.b=c` overrides, and check it.

    Args:
        name_or_path: a shipped sweep's name, or a path ending in .yaml or .yml.
        overrides: dotted assignments; values are YAML. Keys of the space, which hold dots
            themselves, are given whole: `space.method.mask_ratio={grid: [0.5, 0.75]}`.

    Raises:
        ConfigError: there is no such sweep, or a key or value is not allowed.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        known = shipped_sweeps()
        if name_or_path not in known:
            close = difflib.get_close_matches(name_or_path, known, n=1)
            raise ConfigError(
                f"unknown sweep {name_or_path!r}"
                + (f", did you mean {close[0]!r}?" if close else ""),
                hint=f"shipped: {', '.join(known)}; one of your own is a path ending in .yaml",
            )
        path = known[name_or_path]
    elif not path.is_file():
        raise ConfigError(f"no sweep file {path}")
    tree = read_tree(path)
    for assignment in overrides:
        tree = _override(tree, assignment)
    return parse_sweep(tree, f"sweep {name_or_path}")


def parse_sweep(tree: dict[str, Any], origin: str) -> SweepConfig:
    """Check a sweep's tree; errors name the key and what is allowed."""
    try:
        return SweepConfig.model_validate(tree)
    except ValidationError as error:
        keys = tuple(
            f"{section}.{key}"
            for section, field in SweepConfig.model_fields.items()
            for key in getattr(field.annotation, "model_fields", {})
        )
        hint = "docs/tuning.md lists the keys of a sweep"
        raise explain(error, tree, origin, keys=keys, hint=hint) from None


def shipped_sweeps() -> dict[str, Path]:
    """The files of the sweeps inside the package, by name."""
    folder = Path(str(resources.files("mimray.tuning.sweeps")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def make_plan(
    config: SweepConfig, *, data: str, name: str, storage: str, command: str
) -> SweepPlan:
    """Hold a sweep against its data; starts nothing, writes nothing.

    Raises:
        ConfigError: a name that is not one folder's, a key or value of the space that no recipe
            allows, a budget smaller than one rung, or options that the score's task does not know.
        DataError: the data cannot be read, or the score's data has no labels or no held-out
            pictures.
    """
    from mimray.trainers.engine.average import check_average
    from mimray.trainers.engine.deepspeed_keys import check_known
    from mimray.trainers.engine.optim import check_trained

    check_name("sweep", name)
    config = _placed(config)

    def placed(tree: Tree) -> Tree:
        return _with_places(without_held_out(tree, config.score, absolute(data)), storage)

    check_storable(config)
    config = with_recipes(config)
    bases = read_bases(config).changed(placed)
    check_space(config, bases)
    recipe = bases.recipe({})
    source = open_training(data, recipe)
    base = resolve(
        with_classes(with_needs(recipe, fetcher(recipe)), source),
        source.facts,
        config.resources.num_workers,
    )
    if base.recipe.method.learns_classes:
        raise ConfigError("a sweep searches pre-training; finetune has the labels already")
    plan = SweepPlan(
        uri=(RunDir(storage) / name).uri,
        name=name,
        config=config,
        bases=bases,
        facts=source.facts,
        rung_samples=tuple(step * base.global_batch for step in rung_steps(config, base.steps)),
        command=command,
        flops=training_flops(base) if config.budget.unit == "flops" else None,
    )
    trials = listed(config) or [{METHOD: name} for name in config.methods] or [{}]
    for params in trials:
        trial = plan.trial(params)
        check_known(trial)
        if trial.recipe.data.stream != "local":
            raise ConfigError(
                f"data.stream is {trial.recipe.data.stream!r}: a trial decodes beside its workers, "
                "on the CPUs that it holds",
                hint="leave it out, or --set base.set.data.stream=local",
            )
        check_average(trial.recipe)
        check_trained(trial)
    smallest = plan.rung_samples[0]
    if config.budget.samples is not None and config.budget.samples < smallest:
        raise ConfigError(
            f"budget.samples {config.budget.samples} is less than one rung of {smallest} pictures",
            hint=f"at least {plan.rung_samples[-1]} for one whole trial",
        )
    check_score(config.score, source.facts.uri, config.seed)
    return plan


def _with_places(tree: Tree, storage: str) -> Tree:
    """A recipe's tree with absolute places of the bundles that its method needs."""
    method = parse_recipe(tree).method
    places = {
        key: trial_place(place, storage)
        for key in method.bundle_keys
        if (place := getattr(method, key))
    }
    # One that does not exist here is a name, or an address.
    here = {key: absolute(p) for key, p in places.items() if Path(p).expanduser().exists()}
    return {**tree, "method": {**tree["method"], **here}}


def new_record(plan: SweepPlan, study: tuple[str, str]) -> SweepRecord:
    """The record of a sweep before its first trial."""
    score = plan.config.score
    metric, proxy = metric_of(score)
    return SweepRecord(
        name=plan.name,
        uri=plan.uri,
        config=plan.config.model_dump(mode="json"),
        keys=tuple(plan.config.space),
        metric=metric,
        proxy=proxy,
        rung_samples=plan.rung_samples,
        data=plan.facts.uri,
        data_fingerprint=plan.facts.fingerprint,
        score_data=score.data or plan.facts.uri,
        seed=plan.config.seed,
        command=plan.command,
        plan_format=PLAN_FORMAT,
        study=study,
    )


def check_continues(plan: SweepPlan, before: SweepRecord) -> None:
    """Refuse to mix two sweeps in one directory.

    Raises:
        RunConflictError: the directory holds another sweep, or one of an earlier version that is
            to train on; the message names the difference.
    """
    # Parsed again, so that a key that an earlier version did not know has its default.
    old = remembered(RunDir(before.uri), before).model_dump(mode="json")
    new = plan.config.model_dump(mode="json")
    changed = [
        f"{key}: {_shown(a.get(key))} -> {_shown(b.get(key))}"
        for a, b in [(_essential(old), _essential(new))]
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    ]
    if before.data_fingerprint != plan.facts.fingerprint:
        changed.append(f"data: {before.data} -> {plan.facts.uri}")
    trains_on = not before.ended or old != new
    if before.plan_format != PLAN_FORMAT and trains_on:
        changed.append(OTHER_FORMAT)
    if changed:
        raise RunConflictError(
            f"{plan.uri} holds another sweep: {'; '.join(changed)}",
            hint="--fresh starts over, another --name keeps both",
        )


def remembered(directory: RunDir, before: SweepRecord) -> SweepConfig:
    """The configuration that a sweep was started with.

    Raises:
        ConfigError: the configuration was written by a version with other keys.
    """
    tree = dict(before.config)
    if "report_share" not in tree.get("score", {}):
        # An earlier version chose by all pictures; the trials that are left must do so too.
        tree["score"] = {**tree.get("score", {}), "report_share": 0.0}
    return parse_sweep(tree, f"{directory}/{SWEEP}")


def _placed(config: SweepConfig) -> SweepConfig:
    """Make places absolute: processes have working directories of their own."""
    score = config.score
    places = {"data": score.data, "val": score.val, "report": score.report}
    found = {key: absolute(place) for key, place in places.items() if place is not None}
    return config.model_copy(update={"score": score.model_copy(update=found)})


def rung_steps(config: SweepConfig, steps: int) -> tuple[int, ...]:
    """Updates after which a trial is scored, ascending.

    Args:
        config: the sweep's configuration, whose scheduler sets the number and spread of rungs.
        steps: updates of a whole trial.

    Raises:
        ConfigError: a whole trial is shorter than that many rungs.
    """
    scheduler = config.scheduler
    count = scheduler.num_rungs
    if isinstance(scheduler, Asha):
        found = [steps // scheduler.reduction_factor ** (count - 1 - k) for k in range(count)]
    else:
        found = [steps * (k + 1) // count for k in range(count)]
    if found[0] < 1 or len(set(found)) < count:
        raise ConfigError(
            f"budget.steps {steps} is smaller than {count} rungs",
            hint="a larger budget.steps, or fewer scheduler.num_rungs",
        )
    return tuple(found)


def _essential(config: dict[str, Any]) -> dict[str, Any]:
    tree = {key: value for key, value in config.items() if key not in _OPERATIONAL}
    flat: dict[str, Any] = {}
    for section, value in tree.items():
        if section in ("budget", "resources", "score", "scheduler", "searcher", "base"):
            spared = _OPERATIONAL_KEYS.get(section, ())
            flat |= {f"{section}.{k}": v for k, v in value.items() if k not in spared}
        else:
            flat[section] = value
    methods = flat.pop("base.methods", {})
    return flat | {f"base.methods.{name}": base for name, base in methods.items()}


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _override(tree: dict[str, Any], assignment: str) -> dict[str, Any]:
    """Apply one `a.b=value`; below `space` and each `set` the rest is one key of a recipe."""
    found = _ABOVE_A_KEY.match(assignment)
    if found is None:
        return override(tree, [assignment])
    section = found.group()
    key, equals, text = assignment.removeprefix(section).partition("=")
    if not equals:
        raise ConfigError(f"--set {assignment!r} is not of the form a.b=value")
    parts = section.rstrip(".").split(".")
    tree = json.loads(json.dumps(tree))
    node = tree
    for part in parts:
        node = node.setdefault(part, {})
    value = override({}, [f"value={text}"])["value"]
    if value is None and section == "space.":
        node.pop(key, None)
    else:
        node[key] = value
    return tree
