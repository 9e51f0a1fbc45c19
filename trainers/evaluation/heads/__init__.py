"""Heads on feature maps: the views they learn from, their training loop, their files."""
