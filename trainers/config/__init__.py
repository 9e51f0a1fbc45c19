"""Recipes as frozen models: keys, defaults and checks.

In order: `recipes` reads files, `run` holds the recipe and resolves it into a plan; `method`,
`data`, `model`, `optim`, `lora` and `probe` are its sections, `composition` and `schedule` serve
them; `explain` turns pydantic's errors into messages, `advice` warns of settings that are allowed
but unwise.
"""
