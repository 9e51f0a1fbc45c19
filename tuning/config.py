"""A sweep as a user writes it: base recipe, space, searcher, scheduler, budget, score."""

from __future__ import annotations

import contextlib
import math
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    field_validator,
    model_validator,
)

from mimray.trainers.config.base import Config
from mimray.trainers.data.files import refuse_secrets


def _number(value: Any) -> Any:
    """Read `1e-4` as a number, which YAML 1.1 takes for text; `nan` and `1_0` are texts."""
    if isinstance(value, str) and "_" not in value:
        with contextlib.suppress(ValueError):
            if math.isfinite(number := float(value)):
                return number
    return value


def _value(value: Any) -> Any:
    """Any value that a recipe's key may take, as YAML or JSON holds it, with lists as tuples."""
    match value:
        case None | bool() | int():
            return value
        case str():
            return _number(value)
        case float() if math.isfinite(value):
            return value
        case list() | tuple():
            return tuple(_value(item) for item in value)
        case dict() if all(isinstance(key, str) for key in value):
            return {key: _value(item) for key, item in value.items()}
    raise ValueError(f"{value!r} is no value of a recipe: numbers, texts, null, lists and mappings")


Value = Annotated[Any, BeforeValidator(_value)]
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]


class About(Config):
    """A sweep's description of itself."""

    summary: str
    command: str = ""
    cost: str = ""
    source: str = ""


METHOD = "method.name"
"""The key of the space by which trials are of several methods."""


class MethodBase(Config):
    """The recipe that trials of one method begin with, where the space has `method.name`."""

    recipe: str = Field(
        default="",
        description="name of a shipped recipe, or a path ending in .yaml; by default the shipped "
        "one that is named as the base recipe is, such as simmim-tiny beside mae-tiny",
    )
    set: dict[str, Any] = Field(
        default_factory=dict, description="recipe keys changed in every trial of the method"
    )


class BaseConfig(Config):
    """The recipe that every trial begins with."""

    recipe: str = Field(description="name of a shipped recipe, or a path ending in .yaml")
    set: dict[str, Any] = Field(
        default_factory=dict, description="recipe keys changed in every trial"
    )
    methods: dict[str, MethodBase] = Field(
        default_factory=dict, description="recipes of methods, where the space has method.name"
    )


class Grid(Config):
    """Every value, in every combination with other grids."""

    grid: tuple[Value, ...] = Field(min_length=1)


class Choice(Config):
    """One of these, all equally likely."""

    choice: tuple[Value, ...] = Field(min_length=1)


class _Range(Config):
    @model_validator(mode="after")
    def _check_order(self) -> _Range:
        [(kind, bounds)] = self.model_dump().items()
        if not bounds[0] < bounds[1]:
            raise ValueError(f"{kind} {list(bounds)}: the lower bound comes first")
        if kind == "loguniform" and bounds[0] <= 0:
            raise ValueError(f"loguniform {list(bounds)} must be positive")
        return self


class Uniform(_Range):
    """Any number from the first to the second."""

    uniform: tuple[Number, Number]


class LogUniform(_Range):
    """Any number from the first to the second, each order of magnitude equally likely."""

    loguniform: tuple[Number, Number]


class Int(_Range):
    """A whole number from the first to the second, both included."""

    int: tuple[int, int]


def _kind(value: Any) -> str:
    """The kind of a domain, which is its only key."""
    if isinstance(value, Config):
        return next(iter(type(value).model_fields))
    return next(iter(value), "") if isinstance(value, dict) and len(value) == 1 else ""


Domain = Annotated[
    Annotated[Grid, Tag("grid")]
    | Annotated[Choice, Tag("choice")]
    | Annotated[Uniform, Tag("uniform")]
    | Annotated[LogUniform, Tag("loguniform")]
    | Annotated[Int, Tag("int")],
    Discriminator(
        _kind,
        custom_error_type="domain",
        custom_error_message="one of grid: […], choice: […], uniform: [low, high], "
        "loguniform: [low, high], int: [low, high]",
    ),
]


class GridSearch(Config):
    """Every combination of the grids, in order."""

    name: Literal["grid"] = "grid"


class RandomSearch(Config):
    """Drawn independently; a pure function of the seed and the trial's number."""

    name: Literal["random"] = "random"


class OptunaSearch(Config):
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011)."""

    name: Literal["optuna"] = "optuna"
    num_startup_trials: PositiveInt = Field(
        default=8, description="trials drawn at random before the model suggests any"
    )
    multivariate: bool = Field(default=True, description="model keys jointly")


SearcherConfig = Annotated[GridSearch | RandomSearch | OptunaSearch, Field(discriminator="name")]


class Asha(Config):
    """Asynchronous successive halving over pictures seen (Li et al. 2020)."""

    name: Literal["asha"] = "asha"
    reduction_factor: int = Field(
        default=2,
        ge=2,
        description="a rung is so many times longer than the one before, and one "
        "in so many trials passes it",
    )
    num_rungs: PositiveInt = Field(default=3, description="scorings of a whole trial")


class Median(Config):
    """Median stopping: a trial worse than the median of the others ends (Golovin et al. 2017)."""

    name: Literal["median"] = "median"
    num_rungs: PositiveInt = Field(
        default=4, description="scorings of a whole trial, evenly spread"
    )
    min_trials: PositiveInt = Field(default=3, description="others needed before any is stopped")


class NoScheduler(Config):
    """Every trial runs to its end."""

    name: Literal["none"] = "none"
    num_rungs: PositiveInt = Field(
        default=1, description="scorings of a whole trial, evenly spread"
    )


SchedulerConfig = Annotated[Asha | Median | NoScheduler, Field(discriminator="name")]


class Budget(Config):
    """Limits of a sweep; the first one that is reached ends it."""

    trials: PositiveInt | None = Field(
        default=None, description="a grid has its own number, others need one"
    )
    steps: PositiveInt | None = Field(
        default=None, description="updates of a whole trial; the recipe's by default"
    )
    samples: PositiveInt | None = Field(
        default=None, description="pictures seen by all trials together, after which none starts"
    )
    unit: Literal["steps", "flops"] = Field(
        default="steps",
        description="what trials are compared at: as many pictures, or as many FLOPs as the base "
        "recipe spends on its steps, so that a cheaper trial sees more pictures",
    )
    hours: PositiveFloat | None = Field(
        default=None,
        description="wall time of all launches together; what runs then is cut and "
        "goes on with --resume",
    )


class ScoreConfig(Config):
    """The objective: a probe of a trial's frozen encoder on held-out pictures."""

    task: Literal["knn", "linear", "segmentation", "dense-knn", "rankme"] = Field(
        default="knn",
        description="rankme needs no labels, and is only a stand-in for those that do",
    )
    data: str | None = Field(
        default=None, description="labelled pictures to learn from; those trained on by default"
    )
    val: str | None = Field(
        default=None, description="labelled pictures to score on; the data's own split by default"
    )
    label: str | None = Field(
        default=None, description="column of the labels; `label`, or class folders, by default"
    )
    val_share: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="share of each class held out to score on, where the data has no split; no "
        "trial scored by knn or linear trains on it",
    )
    val_seed: NonNegativeInt = Field(default=0, description="the seed that chooses these")
    report: str | None = Field(
        default=None,
        description="unseen labelled pictures that score the winner once; by default DATA's test "
        "split where it has a validation split too (but for labels of pixels), else a share of the "
        "pictures scored on",
    )
    report_share: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="the share of the pictures scored on that is kept from the choice and scores "
        "the winner; 0 for none",
    )
    limit: PositiveInt | None = Field(default=5000, description="pictures of each, evenly spread")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the task")


class Repeats(Config):
    """The best trials again with other seeds: their mean is not the maximum of anything."""

    seeds: NonNegativeInt = Field(default=0, description="other seeds for each of the best trials")
    best: PositiveInt = Field(default=3, description="trials that are repeated")


def _seeds(value: Any) -> Any:
    """Read a plain number as that many seeds."""
    return {"seeds": value} if isinstance(value, int) and not isinstance(value, bool) else value


class TrialResources(Config):
    """The resources of a trial."""

    num_workers: PositiveInt = Field(default=1, description="training workers a trial")
    cpus_per_worker: PositiveInt | None = Field(
        default=None, description="1 on a CPU, an equal share of the node beside a GPU by default"
    )
    gpus_per_worker: float | None = Field(
        default=None,
        gt=0,
        description="a fraction lets trials of one worker share a GPU; 1 where there are any",
    )
    max_failures: int = Field(
        default=3, ge=0, description="process or node losses a trial survives"
    )


class SweepConfig(Config):
    """Everything a user decides about a sweep."""

    about: About | None = None
    base: BaseConfig
    space: dict[str, Domain] = Field(
        min_length=1, description="recipe keys, each with the values to try"
    )
    searcher: SearcherConfig = Field(default_factory=GridSearch)
    scheduler: SchedulerConfig = Field(default_factory=NoScheduler)
    budget: Budget = Field(default_factory=Budget)
    score: ScoreConfig = Field(default_factory=ScoreConfig)
    repeats: Annotated[Repeats, BeforeValidator(_seeds)] = Field(default_factory=Repeats)
    resources: TrialResources = Field(default_factory=TrialResources)
    storage: str = Field(
        default="",
        description="Optuna's storage: sqlite:///… or postgresql://…; SQLite by default",
    )
    study: str = Field(default="", description="name of Optuna's study; the sweep's by default")
    seed: int = Field(default=0, ge=0, description="the seed of the search and of every trial")

    @field_validator("storage")
    @classmethod
    def _without_password(cls, storage: str) -> str:
        refuse_secrets(storage)
        return storage

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that trials are of; empty where all are of the base recipe's."""
        match self.space.get(METHOD):
            case Grid(grid=names) | Choice(choice=names):
                return names
        return ()

    @model_validator(mode="after")
    def _check(self) -> SweepConfig:
        if METHOD in self.space and not self.methods:
            raise ValueError(f"space.{METHOD}: methods are listed, by grid: […] or choice: […]")
        grids = [key for key, domain in self.space.items() if isinstance(domain, Grid)]
        others = [key for key in self.space if key not in grids]
        if self.searcher.name == "grid" and others:
            raise ValueError(
                f"searcher grid goes through grids alone, and {others[0]} is a "
                f"{next(iter(self.space[others[0]].model_dump()))}; take searcher random or optuna"
            )
        if self.searcher.name != "grid" and grids:
            raise ValueError(
                f"searcher {self.searcher.name} draws, and {grids[0]} is a grid; make it a choice, "
                "or take searcher grid"
            )
        if self.searcher.name != "grid" and self.budget.trials is None:
            raise ValueError(
                f"searcher {self.searcher.name} has no end of its own; give budget.trials"
            )
        return self
