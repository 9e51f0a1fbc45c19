"""Recipes as frozen models: what may be set, what it defaults to, what is refused.

In order: `recipes` reads files, `run` holds the recipe and resolves it into a plan; `method`,
`data`, `model` and `optim` are its sections, `composition` and `schedule` serve them; `explain`
tells people what pydantic found, `advice` what is allowed but unwise.
"""
