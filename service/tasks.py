"""The tasks of `mimray evaluate`: those of `trainers`, and the one that runs a whole training."""

from __future__ import annotations

from trainers.evaluation import tasks
from trainers.evaluation.tasks import Task

FINETUNE = Task(
    "finetune", "trainers.config.evaluation.finetune:FinetuneTask", "service.finetuning:evaluate"
)
TASKS = {**tasks.TASKS, FINETUNE.name: FINETUNE}
