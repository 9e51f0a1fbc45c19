"""What an evaluation may be told, one file a task; `mimray.trainers.evaluation` has the tasks."""
