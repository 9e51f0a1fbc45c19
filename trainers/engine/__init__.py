"""The one training loop and what it stands on.

In order: `export` writes bundles; `loop` trains; `checkpoints` are whole or not there, cut anew by
`reshard`; `deepspeed` makes the engine, of `optim` and its `schedule`; `metrics` are rows of a
file.
"""
