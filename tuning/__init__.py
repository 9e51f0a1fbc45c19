"""Hyperparameter search over recipes, by Ray Tune and Optuna, ranked by a probe of the encoder.

In order: `config` is a sweep as it is written, `space` its values, `score` the objective, `search`
the searcher, `study` its trials in a database, `plan` the sweep held against its data, `capacity`
the trials that fit at once, `trial` one trial, `sweep` all of them. `recorder` keeps the `record`
and feeds `trackers`; `report` renders it.
"""
