"""The actor that records a run: the scores of a running probe, over several starts."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mimray.trainers.engine.metrics import MetricsLog, probe_curve
from mimray.trainers.errors import MimrayError, NonFiniteLossError, StoppedError, StorageError
from mimray.trainers.lifeline import Heartbeat
from mimray.trainers.recorder import Launch, RunRecorder, read_launch
from mimray.trainers.storage import RunDir, claim
from mimray.trainers.types import Notice
from tests.trainers.runs import small_plan


class Tracker:
    uri = "nowhere"

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.answers = threading.Event()
        self.answers.set()
        self.status = ""

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        self.answers.wait()
        if metrics["loss"] < 0:
            logging.getLogger("mimray.trainers.tracking").warning("no answer")
            raise RuntimeError("no such column")
        self.logged.append((step, metrics))

    def rows(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self.log(row["step"], row)

    def finish(self, status: str) -> None:
        self.status = status


LAUNCH = Launch("l1", "host", "10.0.0.1:6379", "mimray pretrain", 1000.0)


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> Tracker:
    tracker = Tracker()
    monkeypatch.setattr("mimray.trainers.recorder.track", lambda *args, **options: tracker)
    return tracker


@pytest.fixture
def recorder(tmp_path: Path, tracker: Tracker) -> RunRecorder:
    plan = small_plan()
    claim(RunDir(str(tmp_path / "run")), LAUNCH.launch_id)
    recorder = RunRecorder(
        run_uri=str(tmp_path / "run"),
        storage=str(tmp_path),
        plan=plan.model_dump_json(),
        launch=LAUNCH,
        fresh=False,
    )
    recorder.open()
    return recorder


def test_recorder__an_mlflow_that_refuses_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*arguments: Any, **options: Any) -> Tracker:
        raise StorageError("MLflow refuses the run")

    monkeypatch.setattr("mimray.trainers.recorder.track", refuse)
    claim(RunDir(str(tmp_path / "run")), LAUNCH.launch_id)
    recorder = RunRecorder(
        run_uri=str(tmp_path / "run"),
        storage=str(tmp_path),
        plan=small_plan().model_dump_json(),
        launch=LAUNCH,
        fresh=False,
    )
    assert recorder.failed()  # workers that ask before it is open do not begin

    recorder.open()
    error = recorder.state().error
    recorder.close(error)

    assert recorder.failed()
    assert str(error) == "MLflow refuses the run"
    assert recorder.state().notes == []
    launch = read_launch(RunDir(str(tmp_path / "run")))
    assert launch is not None
    assert (launch.status, launch.reason) == ("FAILED", "MLflow refuses the run")


def row(step: int, **figures: float) -> dict[str, Any]:
    return {"step": step, "loss": 1.0, **figures}


def test_recorder__knows_the_scores_of_earlier_starts(recorder: RunRecorder, tmp_path: Path):
    run = RunDir(str(tmp_path / "run"))
    earlier = [row(2, probe_rankme=5.0), row(3), row(4, probe_rankme=3.0), row(6, probe_rankme=9.0)]
    log = MetricsLog(run, 0)
    for written in earlier:
        log.append(written)

    recorder.resumed(4, 1)  # the row of step 6 is written again
    recorder.metrics(earlier[2])
    recorder.scoring("features", 64, 100)
    assert recorder.state().phase == "features 64/100"
    recorder.metrics(row(5))
    recorder.metrics(row(6, probe_rankme=4.0, probe_seconds=2.0))

    state = recorder.state()
    assert state.phase == ""
    assert state.probe is not None
    assert state.probe.points == ((2, 5.0, None), (4, 3.0, None), (6, 4.0, None))
    assert (state.probe.best, state.probe.last) == ((2, 5.0, None), (6, 4.0, None))


def test_mlflow__gets_the_rows_of_earlier_launches_once(
    recorder: RunRecorder, tracker: Tracker, tmp_path: Path
) -> None:
    log = MetricsLog(RunDir(str(tmp_path / "run")), 0)
    for step in (1, 2, 3):
        log.append(row(step))

    recorder.resumed(2, 1)  # the row of step 3 is written again
    recorder.metrics(row(3))
    recorder.resumed(3, 1)  # after a loss of workers
    recorder.close()

    assert [step for step, _ in tracker.logged] == [1, 2, 3]


def test_mlflow_away__holds_up_no_signal_and_misses_no_row(
    recorder: RunRecorder, tracker: Tracker
) -> None:
    tracker.answers.clear()
    recorder.resumed(0, 1)
    for step in (1, 2):
        recorder.metrics(row(step))
    assert recorder.stop("SIGTERM")  # at once, and so is the progress
    assert recorder.state().row["step"] == 2
    assert tracker.logged == []
    tracker.answers.set()
    recorder.close(StoppedError("SIGTERM"))
    assert [step for step, _ in tracker.logged] == [1, 2]
    assert tracker.status == "KILLED"


def test_mlflow_refuses__a_note_says_so_and_the_rest_is_written(
    recorder: RunRecorder, tracker: Tracker
) -> None:
    recorder.metrics(row(1) | {"loss": -1.0})
    recorder.metrics(row(2))
    recorder.close()
    told = "MLflow was not told: RuntimeError: no such column"
    assert recorder.state().notes == ["no answer", told]
    assert [step for step, _ in tracker.logged] == [2]


def test_beat__hears_of_a_drained_node_and_of_a_signal(
    recorder: RunRecorder, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mimray.trainers.recorder.draining_nodes", lambda: {"this"})
    recorder.look_after()

    def asked() -> list[tuple[Notice, bool]]:
        beats = [Heartbeat(rank, node, "host", 1) for rank, node in enumerate(("this", "other"))]
        return [recorder.beat(beat, None) for beat in beats]

    assert asked() == [(Notice.SAVE, False), (Notice.NONE, False)]
    assert not recorder.stop("SIGTERM")  # nothing trains that could hear it
    recorder.resumed(3, 1)
    assert recorder.stop("SIGTERM")
    assert asked() == [(Notice.STOP, False), (Notice.STOP, False)]
    assert recorder.state().stopping == "SIGTERM"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (NonFiniteLossError("the loss is not finite", hint="lower optim.base_lr"), "FAILED"),
        (StoppedError("ended by SIGTERM"), "KILLED"),
    ],
)
def test_close__keeps_how_the_launch_ended(
    recorder: RunRecorder, tmp_path: Path, error: MimrayError | None, status: str
):
    run = RunDir(str(tmp_path / "run"))
    assert read_launch(run) == LAUNCH

    recorder.close(error)

    ended = read_launch(run)
    assert ended is not None
    assert (ended.status, ended.launch_id) == (status, "l1")
    assert (ended.reason, ended.cure) == (
        (str(error.args[0]), error.hint) if error is not None else ("", "")
    )


def test_close__the_record_of_a_later_launch_is_left_alone(recorder: RunRecorder, tmp_path: Path):
    claim(RunDir(str(tmp_path / "run")), "l2")

    recorder.close(StoppedError("ended by SIGTERM"))

    assert read_launch(RunDir(str(tmp_path / "run"))) == LAUNCH


def test_standing__leaves_the_notes_to_the_driver(recorder: RunRecorder):
    recorder.note("a warning")
    recorder.resumed(4, 2)
    recorder.beat(Heartbeat(1, "node", "host", 7, steps=2), None)

    standing = recorder.standing()

    assert (standing.state.started_at, standing.state.notes, standing.hung) == (4, [], "")
    assert [beat.pid for beat, _ in standing.workers] == [7]
    assert recorder.state().notes == ["a warning"]


def test_files_for_people__that_cannot_be_written_are_told_of(
    recorder: RunRecorder, monkeypatch: pytest.MonkeyPatch
):
    def full(self: RunDir, name: str, data: bytes) -> None:
        raise StorageError(f"no space left in {self}")

    monkeypatch.setattr(RunDir, "append", full)

    recorder.stack(Heartbeat(0, "node", "host", 1), "thread main")

    [note] = recorder.state().notes
    assert note.startswith("hang.log was not written: no space left")


def test_curve__is_of_the_newest_figure():
    newest = row(2, probe_knn_accuracy=0.5, probe_knn_accuracy_standard_error=0.1)
    rows = [row(1, probe_rankme=5.0, probe_seconds=1.0), newest, row(3)]

    curve = probe_curve(rows)

    assert curve is not None
    assert (curve.figure, curve.points) == ("knn_accuracy", ((2, 0.5, 0.1),))
    assert probe_curve([row(1, probe_seconds=1.0)]) is None


def test_resize__waits_for_the_checkpoint_of_every_worker_that_is_heard_of(
    recorder: RunRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert recorder.save()  # nobody trains yet
    recorder.resumed(0, 2)

    def beat(rank: int, *, saved: bool = False) -> Notice:
        return recorder.beat(Heartbeat(rank, "node", "host", rank, steps=2, saved=saved), None)[0]

    assert [beat(0), beat(1)] == [Notice.NONE] * 2
    assert not recorder.save()
    assert [beat(0, saved=True), beat(1)] == [Notice.SAVE] * 2
    assert not recorder.save()
    silent = time.monotonic() + 60
    monkeypatch.setattr("mimray.trainers.recorder.time.monotonic", lambda: silent)
    beat(0, saved=True)
    assert recorder.save()  # rank 1 was lost
    recorder.resumed(2, 1)
    assert beat(0) is Notice.NONE
