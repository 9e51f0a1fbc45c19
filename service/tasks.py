"""The tasks that score an encoder: their names, their options, where their code is."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from trainers.errors import ConfigError

if TYPE_CHECKING:
    from trainers.config.base import Config


class Task(NamedTuple):
    """One way to score an encoder; heavy imports wait until it is chosen.

    Attributes:
        config: module and class of its options.
        evaluate: module and function.
        dense: whether it trains a head on feature maps, on one device; only such heads can be
            trained through an endpoint.
    """

    config: str
    evaluate: str
    dense: bool = False


TASKS = {
    "knn": Task("trainers.config.evaluation.knn:KnnConfig", "trainers.evaluation.knn:evaluate"),
    "linear": Task(
        "trainers.config.evaluation.linear:LinearConfig", "trainers.evaluation.linear:evaluate"
    ),
    "finetune": Task(
        "trainers.config.evaluation.finetune:FinetuneTask", "service.finetuning:evaluate"
    ),
    "segmentation": Task(
        "trainers.config.evaluation.segmentation:SegmentationConfig",
        "trainers.evaluation.segmentation.task:evaluate",
        dense=True,
    ),
    "detection": Task(
        "trainers.config.evaluation.detection:DetectionConfig",
        "trainers.evaluation.detection.task:evaluate",
        dense=True,
    ),
}


def task_config(task: str, overrides: Sequence[str], epochs: int | None = None) -> Config:
    """A task's options, checked.

    Raises:
        ConfigError: an option it does not know, or a value that is not allowed.
    """
    from pydantic import ValidationError

    from trainers.config.base import explain
    from trainers.config.recipes import override

    kind = config_class(task)
    if epochs is not None:
        if "epochs" not in kind.model_fields:
            raise ConfigError(f"--epochs: {task} trains nothing", hint="leave it out")
        overrides = (*overrides, f"epochs={epochs}")
    tree = override({}, overrides)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        hint = f"`mimray evaluate --task {task} --options` lists them"
        raise explain(error, tree, task, keys=tuple(kind.model_fields), hint=hint) from None


def config_class(task: str) -> type[Config]:
    """The class of a task's options."""
    kind: type[Config] = load(TASKS[task].config)
    return kind


def options_of(task: str) -> list[dict[str, Any]]:
    """A task's options with defaults and descriptions."""
    return [
        {"key": name, "default": field.get_default(), "description": field.description or ""}
        for name, field in config_class(task).model_fields.items()
    ]


def load(place: str) -> Any:
    """What `module:name` names."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
