from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import optuna
import pytest

from mimray.tuning.record import SweepRecord
from mimray.tuning.report.importance import importance_of

Make = Callable[..., Any]


def sweep_of(record: Make, trial: Make, score: Callable[[Any, Any], float], **kept: Any) -> Any:
    pairs = itertools.product([0.1, 0.5, 0.9], ["a", None, (1, 2)])
    return record(
        [trial(i, {"x": x, "y": y}, [score(x, y)], **kept) for i, (x, y) in enumerate(pairs)]
    )


def test_importance__finds_the_key_that_matters(record: Make, trial: Make):
    by_number = importance_of(sweep_of(record, trial, lambda x, y: x))
    by_kind = importance_of(sweep_of(record, trial, lambda x, y: float(y is None)))

    assert list(by_number.shares) == ["x", "y"]
    assert list(by_kind.shares) == ["y", "x"]
    assert by_number.shares["x"] > 0.9
    assert by_kind.shares["y"] > 0.9
    assert (by_number.rung, by_number.trials) == (0, 9)


def test_importance__is_the_same_again(record: Make, trial: Make):
    from mimray.tuning.report import importance

    sweep = sweep_of(record, trial, lambda x, y: x + (y == "a") / 3)

    first = importance_of(sweep)
    importance._analysed.cache_clear()

    assert importance_of(sweep) == first


def test_importance__takes_the_last_rung_that_enough_trials_reached(record: Make, trial: Make):
    scores = [[0.1], [0.2, 0.3], [0.3, 0.4], [0.4, 0.5], [0.5, 0.6, 0.7]]
    made = [trial(i, {"x": i, "y": i % 2}, s) for i, s in enumerate(scores)]
    failed = trial(5, {"x": 5, "y": 1}, [0.1, 0.2, 0.3], state="failed")

    found = importance_of(record([*made, failed]))

    assert (found.rung, found.trials) == (1, 4)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_importance__needs_four_trials(record: Make, trial: Make, count: int):
    made = [trial(i, {"x": i}, [i / 10]) for i in range(count)]

    found = importance_of(record(made, keys=("x",)))

    assert found.shares == {}
    assert found.reason.endswith(f"and there are {count}")


def test_importance__says_why_there_is_nothing_to_compare(record: Make, trial: Make):
    one_key = record([trial(i, {"x": i}, [i / 10]) for i in range(4)])
    one_score = record([trial(i, {"x": i, "y": i}, [0.5]) for i in range(4)])
    one_value = record([trial(i, {"x": 1, "y": "a"}, [i / 10]) for i in range(4)])

    assert importance_of(one_key).reason == "only one key is searched"
    assert importance_of(one_score).reason == "all 4 trials have the same score"
    assert importance_of(one_value).reason == "all 4 trials tried the same values"


def test_importance__leaves_optuna_as_talkative_as_it_was(
    grid: SweepRecord, capfd: pytest.CaptureFixture[str]
):
    before = optuna.logging.get_verbosity()

    importance_of(grid)

    assert optuna.logging.get_verbosity() == before
    assert capfd.readouterr().err == ""
