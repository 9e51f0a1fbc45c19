"""The tasks of `mimray evaluate`: those of `trainers`, and fine-tuning, which is a training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mimray.trainers.evaluation import tasks
from mimray.trainers.evaluation.tasks import Task, options_of

FINETUNE = Task(
    "finetune",
    "mimray.trainers.config.evaluation.finetune:FinetuneTask",
    "mimray.service.commands.finetune:evaluate",
)
TASKS = {**tasks.TASKS, FINETUNE.name: FINETUNE}


def task_options(task: str) -> list[dict[str, Any]]:
    """The options of a task with defaults and descriptions."""
    return options_of(TASKS[task])


def options_text(options: Sequence[Mapping[str, Any]]) -> str:
    """Options for people: `key = default` as JSON, the description below."""
    lines = []
    for option in options:
        lines.append(f"{option['key']} = {json.dumps(option['default'])}")
        if option["description"]:
            lines.append(f"    {option['description']}")
    return "\n".join(lines)
