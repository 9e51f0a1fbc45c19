"""The tasks that score an encoder: their names, their options, where their code is."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mimray.trainers.errors import ConfigError

if TYPE_CHECKING:
    from mimray.trainers.config.base import Config


class Task(NamedTuple):
    """One way to score an encoder; heavy imports wait until it is chosen.

    Attributes:
        name: name as the user writes it.
        config: module and class of its options.
        evaluate: module and function.
        dense: True if it works on feature maps, on one device; only such tasks go through an
            endpoint.
        learns_nothing: True if it trains no head, so that a training can afford it on its way.
    """

    name: str
    config: str
    evaluate: str
    dense: bool = False
    learns_nothing: bool = False


TASKS = {
    task.name: task
    for task in (
        Task(
            "knn",
            "mimray.trainers.config.evaluation.knn:KnnConfig",
            "mimray.trainers.evaluation.probes.knn:evaluate",
            learns_nothing=True,
        ),
        Task(
            "linear",
            "mimray.trainers.config.evaluation.linear:LinearConfig",
            "mimray.trainers.evaluation.probes.linear:evaluate",
        ),
        Task(
            "rankme",
            "mimray.trainers.config.evaluation.rankme:RankMeConfig",
            "mimray.trainers.evaluation.probes.rankme:evaluate",
            learns_nothing=True,
        ),
        Task(
            "segmentation",
            "mimray.trainers.config.evaluation.segmentation:SegmentationConfig",
            "mimray.trainers.evaluation.segmentation.task:evaluate",
            dense=True,
        ),
        Task(
            "dense-knn",
            "mimray.trainers.config.evaluation.dense_knn:DenseKnnConfig",
            "mimray.trainers.evaluation.segmentation.dense_knn:evaluate",
            dense=True,
            learns_nothing=True,
        ),
        Task(
            "detection",
            "mimray.trainers.config.evaluation.detection:DetectionConfig",
            "mimray.trainers.evaluation.detection.task:evaluate",
            dense=True,
        ),
    )
}


def task_config(task: Task, overrides: Sequence[str], epochs: int | None = None) -> Config:
    """A task's options from the command line, checked.

    Args:
        task: the task.
        overrides: `key=value` each.
        epochs: length of what is trained; the task's own by default.

    Raises:
        ConfigError: an option it does not know, or a value that is not allowed.
    """
    from mimray.trainers.config.recipes import override

    if epochs is not None:
        if "epochs" not in config_class(task).model_fields:
            raise ConfigError(f"--epochs: {task.name} trains nothing", hint="leave it out")
        overrides = (*overrides, f"epochs={epochs}")
    return checked_options(task, override({}, overrides))


def checked_options(task: Task, tree: Mapping[str, Any]) -> Config:
    """A task's options from a tree, as YAML or JSON holds one, checked.

    Args:
        task: the task.
        tree: values by option; the task's own where one is left out.

    Raises:
        ConfigError: an option it does not know, or a value that is not allowed.
    """
    from pydantic import ValidationError

    from mimray.trainers.config.explain import explain

    kind = config_class(task)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        hint = f"`mimray evaluate --task {task.name} --options` lists them"
        raise explain(error, tree, task.name, keys=tuple(kind.model_fields), hint=hint) from None


def config_class(task: Task) -> type[Config]:
    """The class of a task's options."""
    kind: type[Config] = load(task.config)
    return kind


def options_of(task: Task) -> list[dict[str, Any]]:
    """A task's options with defaults and descriptions."""
    return [
        {"key": name, "default": field.get_default(), "description": field.description or ""}
        for name, field in config_class(task).model_fields.items()
    ]


def load(place: str) -> Any:
    """Import `module:name`."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
