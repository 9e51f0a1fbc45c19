"""The training loop, its DeepSpeed engine, and the files it writes.

In order: `export` writes bundles; `loop` trains; `checkpoints` saves and loads, with `reshard` for
another number of workers; `deepspeed` makes the engine, with the optimiser of `optim` and the
learning rate of `schedule`; `average` keeps what `optim.ema` asks for; `metrics` reads and writes
`metrics.jsonl`.
"""
