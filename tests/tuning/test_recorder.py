"""Records of a recorder: those it keeps, and those that are read again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mimray.trainers.config.run import PLAN_FORMAT
from mimray.trainers.errors import RunConflictError, StorageError
from mimray.trainers.storage import RunDir
from mimray.tuning.plan import SweepPlan, check_continues, new_record, remembered
from mimray.tuning.record import (
    Rung,
    SweepRecord,
    find_sweep,
    find_trial,
    read_record,
    repeat_number,
)
from mimray.tuning.recorder import SweepRecorder

Small = Callable[..., SweepPlan]


def rung_of(number: int, score: float) -> Rung:
    return Rung(number=number, step=2, samples=16, score=score, train_s=2.0, score_s=0.5)


@pytest.fixture
def plan(small: Small) -> SweepPlan:
    made = small()
    made.directory.create()
    return made


@pytest.fixture
def recorder(plan: SweepPlan, tmp_path: Path) -> SweepRecorder:
    record = new_record(plan, ("sweep", "sqlite://"))
    return SweepRecorder(record=record.model_dump_json(), storage=str(tmp_path), tracked=False)


def test_recorder__what_it_knows_is_on_disk_at_once(
    recorder: SweepRecorder, plan: SweepPlan
) -> None:
    recorder.begin(0, {"method.mask_ratio": 0.5}, 2.0, "")
    recorder.begin(1, {"method.mask_ratio": 0.75}, 2.0, "")
    recorder.metrics(0, {"step": 2, "loss": 0.25})
    recorder.rung(0, rung_of(0, 0.4))
    recorder.rung(0, rung_of(0, 0.9))  # told again after a kill; the first counts
    recorder.passed(0)
    recorder.lost(1)
    recorder.end(1, "failed", "NaN")
    recorder.end(1, "finished")  # the first end counts

    record = read_record(plan.directory)
    assert record == recorder.snapshot()[0].model_copy(update={"elapsed_s": record.elapsed_s})
    first, second = record.trials
    assert (first.state, first.score, first.loss, first.samples) == ("running", 0.4, 0.25, 16)
    assert first.rungs[0].passed
    assert first.device_seconds == 2.0 * 2.5
    assert (second.state, second.reason, second.failures) == ("failed", "NaN", 1)


def test_close__cuts_what_runs_and_a_later_one_goes_on(
    recorder: SweepRecorder, plan: SweepPlan
) -> None:
    recorder.begin(0, {}, 1.0, "")
    recorder.rung(0, rung_of(0, 0.4))
    assert not recorder.close(False, "KILLED").ended
    record = read_record(plan.directory)
    assert record.trials[0].state == "cut"
    assert record.elapsed_s > 0

    later = SweepRecorder(record=record.model_dump_json(), storage="", tracked=False)
    known = later.begin(0, {}, 1.0, "")
    assert (known.state, known.score) == ("running", 0.4)
    check_continues(plan, record)
    assert remembered(plan.directory, record) == plan.config


def test_sweep__of_another_plan_format_is_read_and_not_trained_on(
    plan: SweepPlan, small: Small
) -> None:
    tree = json.loads(new_record(plan, ("", "")).model_dump_json())
    assert tree.pop("plan_format") == PLAN_FORMAT
    under_way = SweepRecord.model_validate(tree)
    ended = SweepRecord.model_validate({**tree, "ended": True})

    with pytest.raises(RunConflictError, match="order and pixels of training pictures"):
        check_continues(plan, under_way)
    check_continues(plan, ended)  # to report it again
    with pytest.raises(RunConflictError, match="as of an earlier version of mimray"):
        check_continues(small("repeats=2"), ended)


def test_notes__are_handed_out_once(recorder: SweepRecorder) -> None:
    recorder.note("slow disk")
    recorder.note("slow disk")
    recorder.current()  # which shows nothing to anybody
    assert recorder.snapshot()[2] == ["slow disk"]
    assert recorder.snapshot()[2] == []


def test_ranked__the_farthest_first_then_the_best(recorder: SweepRecorder, plan: SweepPlan) -> None:
    for number, scores in enumerate([(0.9,), (0.3, 0.5), (0.3, 0.6), ()]):
        recorder.begin(number, {}, 1.0, "")
        for place, score in enumerate(scores):
            recorder.rung(number, rung_of(place, score))
    record = read_record(plan.directory)
    assert [trial.number for trial in record.ranked()] == [2, 1, 0]
    assert record.best is not None
    assert record.best.number == 2


def test_find__by_name_by_directory_and_by_trial(recorder: SweepRecorder, plan: SweepPlan) -> None:
    storage = str(Path(plan.uri).parent)
    assert find_sweep("sweep", storage).uri == plan.uri
    assert find_sweep(plan.uri, "elsewhere").uri == plan.uri
    with pytest.raises(StorageError, match="no sweep 'other'"):
        find_sweep("other", storage)
    with pytest.raises(StorageError, match="no trial of sweep has a score"):
        find_trial("sweep:best", storage)
    recorder.begin(0, {}, 1.0, "")
    recorder.rung(0, rung_of(0, 0.4))
    for reference in ("sweep:best", "sweep:0", f"{plan.uri}:best", f"{plan.uri}:0000"):
        found = find_trial(reference, storage)
        assert found is not None
        assert found[1].number == 0
    recorder.begin(repeat_number(0, 1), {}, 1.0, "")
    with pytest.raises(StorageError, match=r"no trial 7 \(0 to 0\)"):
        find_trial("sweep:7", storage)
    assert find_trial("runs/mae-tiny", storage) is None
    assert find_trial("s3://bucket/run", storage) is None
    assert RunDir(plan.uri).exists("trials/0000/trial.json")
