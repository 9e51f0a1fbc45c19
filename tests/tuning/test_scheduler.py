"""Which trials are stopped, held against the rule written down anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import TrialScheduler

from mimray.tuning.config import SweepConfig
from mimray.tuning.record import Rung, TrialRecord
from mimray.tuning.search import SAMPLES, SCORE
from mimray.tuning.sweep import RecordingScheduler, _scheduler

RUNGS = (100, 200, 400)
Configured = Callable[..., SweepConfig]


@dataclass(frozen=True)
class Trial:
    """What schedulers ask of Tune's trials."""

    trial_id: str
    number: int

    @property
    def config(self) -> dict[str, Any]:
        return {"number": self.number}


class Recorder:
    """Notes who passed."""

    def __init__(self) -> None:
        self.passes: list[int] = []
        self.passed = SimpleNamespace(remote=self.passes.append)


def verdicts_of(config: SweepConfig) -> RecordingScheduler:
    return RecordingScheduler(_scheduler(config, RUNGS), Recorder())


def rung_of(number: int, score: float, passed: bool = True) -> Rung:
    return Rung(
        number=number, step=RUNGS[number] // 10, samples=RUNGS[number], score=score,
        train_s=1.0, score_s=0.5, passed=passed,
    )  # fmt: skip


def play(
    scheduler: RecordingScheduler, curves: list[tuple[float, ...]], first: int = 0
) -> list[int]:
    """Run trials one after the other, each as far as it is let; gives the rungs they reached."""
    reached = []
    for number, curve in enumerate(curves, start=first):
        trial = Trial(f"t{number}", number)
        scheduler.on_trial_add(None, trial)
        for rung, samples in enumerate(RUNGS):
            result = {SAMPLES: samples, SCORE: curve[rung]}
            if rung == len(RUNGS) - 1:
                scheduler.on_trial_complete(None, trial, result)
            elif scheduler.on_trial_result(None, trial, result) == TrialScheduler.STOP:
                scheduler.on_trial_complete(None, trial, result)
                break
        reached.append(rung + 1)
    return reached


def halving(curves: list[tuple[float, ...]], factor: int) -> list[int]:
    """ASHA by Li et al. 2020, Algorithm 2, as Ray has it: go on if in the best 1/factor so far."""
    seen: list[list[float]] = [[] for _ in RUNGS]
    reached = []
    for curve in curves:
        for rung in range(len(RUNGS)):
            others, mine = list(seen[rung]), curve[rung]
            seen[rung].append(mine)
            if others and mine < np.percentile(others, 100 * (1 - 1 / factor)):
                break
        reached.append(rung + 1)
    return reached


@pytest.mark.parametrize("seed", range(4))
def test_asha__stops_the_right_trials(configured: Configured, seed: int) -> None:
    rng = np.random.default_rng(seed)
    worth = rng.random(40)
    curves = [tuple(w * share + 0.05 * rng.random() for share in (0.4, 0.7, 1.0)) for w in worth]
    reached = play(verdicts_of(configured()), curves)
    assert reached == halving(curves, factor=2)
    assert reached[int(np.argmax(worth))] == 3
    assert sum(r < 3 for r in reached) > 15


def test_none__lets_all_go_on(configured: Configured) -> None:
    config = configured("scheduler={name: none, num_rungs: 3}")
    assert play(verdicts_of(config), [(0.1, 0.1, 0.1), (0.9, 0.9, 0.9)] * 3) == [3] * 6


def test_median__stops_what_is_below_the_others(configured: Configured) -> None:
    config = configured("scheduler={name: median, num_rungs: 3, min_trials: 3}")
    curves = [(0.5, 0.6, 0.7), (0.6, 0.7, 0.8), (0.4, 0.5, 0.6), (0.1, 0.1, 0.1), (0.9, 0.9, 0.9)]
    assert play(verdicts_of(config), curves) == [3, 3, 3, 1, 3]


@pytest.mark.parametrize("name", ["asha", "median"])
def test_replay__a_later_launch_judges_as_one_launch_would(
    configured: Configured, name: str
) -> None:
    options = {"asha": "reduction_factor: 2, num_rungs: 3", "median": "num_rungs: 3"}
    config = configured(f"scheduler={{name: {name}, {options[name]}}}")
    rng = np.random.default_rng(1)
    curves = [tuple(np.sort(rng.random(3))) for _ in range(16)]
    wanted = play(verdicts_of(config), curves)

    done = [
        TrialRecord(
            number=number, params={}, state="finished" if reached == 3 else "stopped",
            rungs=tuple(rung_of(r, curves[number][r]) for r in range(reached)),
        )
        for number, reached in enumerate(wanted[:8])
    ]  # fmt: skip
    later = verdicts_of(config)
    later.replay(done)
    assert play(later, curves[8:], first=8) == wanted[8:]


def test_replay__a_rung_that_was_not_judged_is_left_to_its_trial(configured: Configured) -> None:
    scheduler = verdicts_of(configured())
    half_way = TrialRecord(
        number=0, params={}, state="cut", rungs=(rung_of(0, 0.9), rung_of(1, 0.9, passed=False))
    )
    scheduler.replay([half_way])
    # The first rung is known, so a worse trial is stopped there; of the second nothing is.
    assert play(scheduler, [(0.1, 0.1, 0.1)], first=1) == [1]
    assert play(scheduler, [(0.95, 0.1, 0.1)], first=2) == [3]


def test_verdicts__are_written_down(configured: Configured) -> None:
    scheduler = verdicts_of(configured())
    play(scheduler, [(0.9, 0.9, 0.9), (0.1, 0.1, 0.1)])
    assert scheduler._recorder.passes == [0, 0]
    assert scheduler.stopped == {"t1"}
