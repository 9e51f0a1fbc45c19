"""Options of the tasks of `mimray.trainers.evaluation`, one file a task."""
