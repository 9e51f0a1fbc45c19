"""Shipped recipes: YAML files, each saying its command, cost and expected score."""
