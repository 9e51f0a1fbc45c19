"""The search over recipes: space, objective, sweep and report."""
