"""Recipes as frozen models: what may be set, what it defaults to, what is refused."""
