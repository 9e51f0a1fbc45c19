"""What is suggested, and that Optuna itself finds the same trials."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from ray.tune.search import Searcher

from mimray.trainers.errors import RunConflictError, StorageError
from mimray.tuning.config import SweepConfig
from mimray.tuning.record import Rung, TrialRecord
from mimray.tuning.search import NUMBER, SAMPLES, SCORE, Suggestions
from mimray.tuning.space import combinations, listed
from mimray.tuning.study import open_study

Configured = Callable[..., SweepConfig]
TPE = [
    "searcher={name: optuna, num_startup_trials: 4}", "budget.trials=12",
    "space.method.mask_ratio={uniform: [0.2, 0.9]}",
    "space.method.decoder_depth={choice: [1, 2, 4]}",
]  # fmt: skip
SIZES = ["space.method.decoder_depth=null", "space.data.image_size={grid: [[32, 32], [64, 64]]}"]


def suggestions(
    config: SweepConfig, storage: str, before: tuple[TrialRecord, ...] = (), room: bool = True
) -> Suggestions:
    study = open_study(config, "s", storage)
    return Suggestions(config, study, before, lambda: room, lambda params: None)


@pytest.fixture
def storage(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/study.db"


def worth(params: dict[str, Any]) -> float:
    return 1 - abs(params["method.mask_ratio"] - 0.6) + 0.01 * params["method.decoder_depth"]


def finish(search: Suggestions, tune_id: str, found: dict[str, Any], score: float) -> TrialRecord:
    """Report one rung and the end of a trial, as a sweep does."""
    search.on_trial_result(tune_id, {SAMPLES: 100, SCORE: score})
    search.on_trial_complete(tune_id)
    rung = Rung(number=0, step=10, samples=100, score=score, train_s=1, score_s=1)
    record = TrialRecord(
        number=found["number"], params=found["params"], state="finished", rungs=(rung,)
    )
    search.ended(record)
    return record


def all_of(search: Suggestions) -> list[dict[str, Any]]:
    """Go through a search one trial after the other."""
    found = []
    while (suggestion := search.suggest(f"t{len(found)}")) != Searcher.FINISHED:
        assert suggestion is not None
        found.append(suggestion)
        finish(search, f"t{len(found) - 1}", suggestion, worth(suggestion["params"]))
    return found


def test_grid__every_combination_in_order(configured: Configured, storage: str) -> None:
    config = configured()
    found = all_of(suggestions(config, storage))
    assert [f["params"] for f in found] == combinations(config)
    assert [f["number"] for f in found] == list(range(24))


@pytest.mark.parametrize("kind", ["grid", "random", "optuna"])
def test_study__opened_by_optuna_holds_the_same_trials(
    configured: Configured, storage: str, kind: str
) -> None:
    overrides = {
        "grid": [],
        "random": ["searcher={name: random}", *TPE[1:]],
        "optuna": TPE,
    }[kind]
    config = configured(*overrides)
    found = all_of(suggestions(config, storage))

    study = optuna.load_study(study_name="s", storage=storage)
    assert len(study.trials) == len(found)
    for trial in study.trials:
        mine = found[trial.user_attrs[NUMBER]]["params"]
        assert trial.params == mine
        assert trial.value == pytest.approx(worth(mine))
        assert trial.intermediate_values == {100: trial.value}
        assert trial.state == optuna.trial.TrialState.COMPLETE
    assert study.best_trial.params == max((f["params"] for f in found), key=worth)


def test_tpe__same_seed_same_trials_and_it_learns(configured: Configured, tmp_path: Path) -> None:
    config = configured(*TPE, "budget.trials=30")
    one = all_of(suggestions(config, f"sqlite:///{tmp_path}/a.db"))
    assert all_of(suggestions(config, f"sqlite:///{tmp_path}/b.db")) == one
    other = configured(*TPE, "budget.trials=6", "seed=1")
    assert all_of(suggestions(other, f"sqlite:///{tmp_path}/c.db")) != one[:6]
    scores = [worth(f["params"]) for f in one]
    # Drawn at random they would have 0.85 on average.
    assert sum(scores[-15:]) / 15 > 0.92


def test_tpe__a_later_launch_goes_on_as_one_launch_would(
    configured: Configured, tmp_path: Path
) -> None:
    config = configured(*TPE)
    wanted = all_of(suggestions(config, f"sqlite:///{tmp_path}/whole.db"))
    cut = f"sqlite:///{tmp_path}/cut.db"
    first = suggestions(config, cut)
    done = []
    for number in range(7):
        found = first.suggest(f"a{number}")
        assert found is not None
        done.append(finish(first, f"a{number}", found, worth(found["params"])))
    under_way = first.suggest("a7")
    assert under_way is not None
    done.append(TrialRecord(number=7, params=under_way["params"], state="running"))

    later = all_of(suggestions(config, cut, tuple(done)))
    assert [f["number"] for f in later] == [7, 8, 9, 10, 11]
    assert later == wanted[7:]
    assert len(optuna.load_study(study_name="s", storage=cut).trials) == 12


@pytest.mark.parametrize("kept", [True, False], ids=["study-kept", "study-lost"])
@pytest.mark.parametrize("kind", ["grid", "optuna"])
def test_later_launch__gives_every_number_once_whichever_was_recorded(
    configured: Configured, tmp_path: Path, kind: str, kept: bool
) -> None:
    config = configured(*TPE) if kind == "optuna" else configured()
    first = suggestions(config, f"sqlite:///{tmp_path}/first.db")
    asked = [first.suggest(f"a{number}") for number in range(4)]
    # Of four trials at once, the driver was killed before two of them were recorded.
    before = tuple(
        TrialRecord(number=number, params=found["params"], state="cut")
        for number, found in enumerate(asked)
        if found is not None and number in (1, 3)
    )

    storage = f"sqlite:///{tmp_path}/{'first' if kept else 'other'}.db"
    later = all_of(suggestions(config, storage, before))

    total = 12 if kind == "optuna" else 24
    assert [f["number"] for f in later] == [1, 3, 0, 2, *range(4, total)]
    if kept or kind == "grid":
        assert sorted(later[:4], key=lambda f: f["number"]) == asked
    trials = optuna.load_study(study_name="s", storage=storage).trials
    assert sorted(t.user_attrs[NUMBER] for t in trials) == list(range(total))
    assert {t.state.name for t in trials} == {"COMPLETE"}


def test_study__that_was_lost_is_made_again_from_the_sweep(
    configured: Configured, storage: str
) -> None:
    config = configured()
    rung = Rung(number=0, step=10, samples=100, score=0.3, train_s=1, score_s=1)
    trials = listed(config)
    assert trials is not None
    before = (
        TrialRecord(number=0, params=trials[0], state="finished", rungs=(rung,)),
        TrialRecord(number=1, params=trials[1], state="stopped", rungs=(rung,), reason="late"),
        TrialRecord(number=2, params=trials[2], state="failed", reason="NaN"),
    )
    suggestions(config, storage, before)
    states = [t.state.name for t in optuna.load_study(study_name="s", storage=storage).trials]
    assert states == ["COMPLETE", "PRUNED", "FAIL"]


def test_study__of_another_space_is_refused(configured: Configured, storage: str) -> None:
    open_study(configured(), "s", storage)
    open_study(configured(), "s", storage)
    with pytest.raises(RunConflictError, match="another space"):
        open_study(configured(*SIZES), "s", storage)
    open_study(configured(*SIZES), "s", storage, fresh=True)


def test_study__whose_database_is_not_there_names_it_without_the_password(
    configured: Configured,
) -> None:
    with pytest.raises(StorageError) as caught:
        open_study(configured(), "s", "postgresql://me:secret@127.0.0.1:1/none")
    assert "me:***@127.0.0.1" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_values__that_optuna_cannot_hold_come_back_as_they_were(
    configured: Configured, storage: str
) -> None:
    config = configured(*SIZES)
    search = suggestions(config, storage)
    found = [search.suggest(f"t{i}") for i in range(12)]
    assert {f["params"]["data.image_size"] for f in found if f} == {(32, 32), (64, 64)}


def test_budget__that_is_spent_ends_it(configured: Configured, storage: str) -> None:
    search = suggestions(configured(), storage, room=False)
    assert search.suggest("t0") == Searcher.FINISHED
    assert not search.exhausted


@pytest.mark.parametrize("searcher", ["random", "optuna, num_startup_trials: 2"])
def test_pairs_and_mappings__are_suggested_as_the_sweep_has_them_and_after_a_resume(
    configured: Configured, storage: str, searcher: str
) -> None:
    config = configured(
        f"searcher={{name: {searcher}}}", "budget.trials=6", "space.method.mask_ratio=null",
        "space.method.decoder_depth=null",
        "space.data.crop_scale={choice: [[0.2, 1.0], [0.6, 1.0]]}",
        "space.optim.weight_decay={choice: [0.05, {start: 0.04, end: 0.4}]}",
        "space.optim.clip_grad_norm={choice: [null, 1.0]}",
    )  # fmt: skip
    search = suggestions(config, storage)
    records, seen = [], []
    for number in range(3):
        found = search.suggest(f"t{number}")
        assert found is not None
        record = finish(search, f"t{number}", found, 0.1 * number)
        records.append(TrialRecord.model_validate_json(record.model_dump_json()))
    again = suggestions(config, storage, tuple(records))
    while (found := again.suggest("t")) != Searcher.FINISHED:
        assert found is not None
        seen.append(found["params"])
        finish(again, "t", found, 0.5)
    assert len(seen) == 3
    for params in [*(r.params for r in records), *seen]:
        assert tuple(params["data.crop_scale"]) in {(0.2, 1.0), (0.6, 1.0)}
        assert params["optim.weight_decay"] in (0.05, {"start": 0.04, "end": 0.4})
        assert params["optim.clip_grad_norm"] in (None, 1.0)
    finished = [t for t in optuna.load_study(study_name="s", storage=storage).trials if t.value]
    assert {t.params["data.crop_scale"] for t in finished} <= {"[0.2, 1.0]", "[0.6, 1.0]"}
