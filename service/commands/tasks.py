"""The tasks of `mimray evaluate`: those of `trainers`, and the one that runs a whole training."""

from __future__ import annotations

from mimray.trainers.evaluation import tasks
from mimray.trainers.evaluation.tasks import Task

FINETUNE = Task(
    "finetune",
    "mimray.trainers.config.evaluation.finetune:FinetuneTask",
    "mimray.service.commands.finetune:evaluate",
)
TASKS = {**tasks.TASKS, FINETUNE.name: FINETUNE}
