"""What a sweep's driver does around Tune, with Ray's part played here: budgets, and warnings."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from mimray.tuning import sweep
from mimray.tuning.capacity import Capacity
from mimray.tuning.plan import SweepPlan
from mimray.tuning.record import SWEEP, Rung, SweepRecord, read_record
from mimray.tuning.recorder import SweepRecorder
from mimray.tuning.sweep import Launch, run_sweep

Small = Callable[..., SweepPlan]
RUNG = Rung(number=0, step=2, samples=16, score=0.5, train_s=1.0, score_s=0.1)


class Clock:
    """Seconds, as a test lets them pass."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


class Actor:
    """An actor's handle, of an object at hand; what is called is done at once."""

    def __init__(self, inner: object) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._inner, name))


class Tuner:
    """Asks for one trial after the other, and ends each at once."""

    played: list[Tuner]
    clock: Clock
    trial_s = 0.0
    note = ""

    def __init__(self, trainable: Any, *, tune_config: Any, run_config: Any) -> None:
        self.tune_config, self.callback = tune_config, run_config.callbacks[0]
        self.played.append(self)

    def fit(self) -> None:
        search, recorder = self.tune_config.search_alg, self.tune_config.scheduler._recorder
        while isinstance(found := search.suggest("tune's id"), dict):
            recorder.begin.remote(found["number"], found["params"], 1.0, "")
            recorder.rung.remote(found["number"], RUNG)
            if self.note:
                recorder.note.remote(f"{self.note} {found['number']}")
            self.clock.now_s += self.trial_s
            trial = SimpleNamespace(trial_id="tune's id", config=found, last_result={"done": True})
            self.callback.on_trial_complete(0, [], trial)


@pytest.fixture
def tuner(monkeypatch: pytest.MonkeyPatch) -> type[Tuner]:
    """Stands in for Tune's own; nobody looks at the recorder meanwhile."""

    class Played(Tuner):
        played: list[Tuner] = []
        clock = Clock()

    def open_recorder(record: SweepRecord, launch: Launch) -> Actor:
        written = record.model_dump_json()
        return Actor(SweepRecorder(record=written, storage=launch.storage, tracked=False))

    monkeypatch.setattr(sweep.tune, "Tuner", Played)
    monkeypatch.setattr(sweep.tune, "with_parameters", lambda trainable, **_: trainable)
    monkeypatch.setattr(sweep, "time", Played.clock)
    monkeypatch.setattr(sweep, "POLL_S", 3600)
    monkeypatch.setattr(sweep, "_open_recorder", open_recorder)
    monkeypatch.setattr(sweep, "ray", SimpleNamespace(get=lambda x: x, kill=lambda actor: None))
    monkeypatch.setattr(sweep, "count", lambda *_: Capacity(1, 1, 0.0, 2, "two at once"))
    return Played


def test_warnings__are_shown_whenever_they_are_taken(tuner: type[Tuner], small: Small) -> None:
    tuner.note = "a slow disk at trial"
    plan = small()
    shown: list[str] = []
    states: list[SweepRecord] = []

    def watch(record: SweepRecord, rows: dict[int, dict[str, Any]], notes: list[str]) -> None:
        shown.extend(notes)
        states.append(record)

    final = run_sweep(Launch(plan, plan.uri), watch)

    assert final.ended
    assert states[-1].ended
    assert [note for note in shown if "slow disk" in note] == [
        f"a slow disk at trial {number}" for number in range(4)
    ]


def test_hours__are_those_of_all_launches_together(tuner: type[Tuner], small: Small) -> None:
    plan = small("budget.hours=2")
    tuner.trial_s = 0.5 * 3600
    assert not run_sweep(Launch(plan, plan.uri)).ended  # its time was up as the last one ended

    for spent_h in (1.5, 7):
        record = read_record(plan.directory).model_copy(update={"elapsed_s": spent_h * 3600})
        tree = record.model_dump_json(exclude={"trials"})
        plan.directory.write(SWEEP, tree.encode())
        assert run_sweep(Launch(plan, plan.uri)).ended
    given = [played.tune_config.time_budget_s for played in tuner.played]
    assert given == [7200, pytest.approx(1800, abs=10), 1]


def test_samples__that_are_spent_start_no_other_trial(tuner: type[Tuner], small: Small) -> None:
    plan = small("budget.samples=20")  # pictures; a trial sees 16 here
    record = run_sweep(Launch(plan, plan.uri))
    assert [trial.state for trial in record.trials] == ["finished"] * 2
    assert not record.ended
