"""The detection task: a detector on feature maps, its metrics and pictures."""
