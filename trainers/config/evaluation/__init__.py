"""What an evaluation may be told, one file a task; `trainers.evaluation` has the tasks."""
