"""The one training loop and what it stands on: DeepSpeed, schedules, checkpoints."""
