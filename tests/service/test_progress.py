"""Progress off a terminal, a line now and then; on one, a view redrawn in place."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mimray.service.terminal import progress as module
from mimray.service.terminal.phases import PhaseLink
from mimray.service.terminal.progress import Pace, Progress, show_count, show_phases, show_training
from mimray.trainers.engine.metrics import ProbeCurve, ProbeScore
from mimray.trainers.recorder import RunState


class Clock:
    now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def row(step: int) -> dict[str, float]:
    return {"step": step, "loss": 1 / step, "images_per_s": 64.0}


def test_training__a_line_every_ten_seconds_and_the_last(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    warnings = io.StringIO()
    with Progress(Console(file=warnings)) as progress:
        show = show_training(progress, 8)
        show(RunState(notes=["slow disk"]))
        for _ in range(3):
            clock.now_s += 12
            show(RunState())
        for step in (1, 2, 2, 3, 8):
            clock.now_s += 6
            show(RunState(row=row(step)))
    assert capsys.readouterr().err.splitlines() == [
        "starting workers",
        "step 1/8  loss 1.0000  64 images/s",
        "step 3/8  loss 0.3333  64 images/s  45 s left",
        "step 8/8  loss 0.1250  64 images/s",
    ]
    assert warnings.getvalue() == "warning: slow disk\n"


def test_training__the_newest_and_the_best_score_of_a_probe_and_the_one_under_way(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(Console(file=io.StringIO())) as progress:
        show = show_training(progress, 90)
        show(RunState(row=row(2), phase="features of val 64/200"))
        clock.now_s += 12
        scores = ((1, 0.31), (2, 0.4567), (4, 0.4))
        points = tuple(ProbeScore(step, value, 0.01) for step, value in scores)
        curve = ProbeCurve("knn_accuracy", points)
        show(RunState(row=row(4), probe=curve))
    assert capsys.readouterr().err.splitlines() == [
        "step 2/90  loss 0.5000  64 images/s  probe: features of val 64/200",
        "step 4/90  loss 0.2500  64 images/s  knn_accuracy 0.4000 ± 0.0100 (best 0.4567 at step 2)",
    ]


def test_count__a_rate_from_the_start_and_what_was_rejected(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(Console(file=io.StringIO())) as progress:
        show = show_count(progress, "ingesting", "pictures")
        clock.now_s += 5
        show(0, 100)
        for done in (20, 40, 50, 100):
            clock.now_s += 10
            show(done, 100, done // 50)
    assert capsys.readouterr().err.splitlines() == [
        "ingesting 20/100",  # after 10 s, most of them the start of processes
        "ingesting 40/100  2 pictures/s",
        "ingesting 50/100  2 pictures/s  33 s left  1 rejected",
        "ingesting 100/100  3 pictures/s  2 rejected",
    ]


def test_left__is_shown_when_several_steps_over_some_seconds_tell_the_rate(clock: Clock) -> None:
    pace = Pace()
    shown = []
    for seconds, done in ((0, 0), (60, 1), (1, 2), (1, 3), (2, 4), (1, 4), (1, 10)):
        clock.now_s += seconds
        pace.report(done)
        shown.append(pace.left(10))
    assert shown == ["", "", "", "", "8 s left", "10 s left", ""]


def test_left__starts_anew_after_a_decrease(clock: Clock) -> None:
    pace = Pace()
    for done in (10, 20, 30, 5):
        clock.now_s += 5
        pace.report(done)
    assert pace.left(50) == ""
    assert pace.rate == 0


def test_terminal__bars_and_no_lines(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    with Progress(Console(file=stream, force_terminal=True, width=100)) as progress:
        show = show_phases(progress)
        show("a", "features", 10, 10)
        show("b", "training", 4, 4)
    assert capsys.readouterr().err == ""
    drawn = stream.getvalue()
    assert "a: features" in drawn
    assert "10/10" in drawn
    assert "b: training" in drawn


def test_progress__a_line_a_phase_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(Console(file=io.StringIO())) as progress:
        shown = show_phases(progress)
        shown("a", "features", 1, 10)
        shown("a", "features", 2, 10)
        shown("b", "training", 1, 4)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["a: features 1/10", "b: training 1/4"]


def test_phase_link__tells_the_end_of_every_phase() -> None:
    told = []

    class Tell:
        def remote(self, number: int, state: tuple[str, int, int]) -> None:
            told.append((number, state))

    class Handle:
        tell = Tell()

    report = PhaseLink(Handle(), 7)
    for done in range(1, 101):
        report("features", done, 100)
    assert told[0] == (7, ("features", 1, 100))
    assert told[-1] == (7, ("features", 100, 100))
    assert len(told) < 100
