"""What a person sees of a sweep while it runs."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from mimray.service.terminal import progress
from mimray.service.terminal.progress import Progress
from mimray.service.terminal.sweep_table import SweepTable
from mimray.tuning.plan import load_sweep
from mimray.tuning.record import Rung, SweepRecord, TrialRecord

RUNGS = (100, 200, 400)
PLAN: Any = SimpleNamespace(config=load_sweep("mae-mask-depth"), rung_samples=RUNGS)


def trial(number: int, state: str, *scores: float, **changes: Any) -> TrialRecord:
    rungs = tuple(
        Rung(number=n, step=n + 1, samples=RUNGS[n], score=s, train_s=4.0, score_s=1.0)
        for n, s in enumerate(scores)
    )
    params = {"method.mask_ratio": 0.5 + number / 10, "method.decoder_depth": 2}
    fields = {"number": number, "params": params, "state": state, "rungs": rungs} | changes
    return TrialRecord(**fields, samples=rungs[-1].samples if rungs else 0)


def record_of(*trials: TrialRecord) -> SweepRecord:
    return SweepRecord(
        name="s", uri="/s", config={}, keys=("method.mask_ratio", "method.decoder_depth"),
        metric="accuracy", rung_samples=RUNGS, data="d", data_fingerprint="f", score_data="d",
        seed=0, command="c", trials=trials,
    )  # fmt: skip


RECORD = record_of(
    trial(0, "finished", 0.2, 0.3, 0.41),
    trial(1, "stopped", 0.1),
    trial(2, "failed", reason="NonFiniteLossError: the loss is not finite at step 3"),
    trial(3, "running", 0.25),
)


def test_terminal__a_table_with_rung_score_cost_and_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=140, color_system=None)
    table = SweepTable(Progress(console), PLAN)
    table(RECORD, {3: {"samples": 110, "loss": 0.5}}, [])
    clock[0] = 5.0
    table(RECORD, {3: {"samples": 140, "loss": 0.5}}, [])
    clock[0] = 10.0
    rows = {3: {"samples": 160, "loss": 0.4567}}
    with console.capture() as capture:
        console.print(table._table(RECORD, rows))
        console.print(table._summary(RECORD, table._left(RECORD, rows)))
    text = capture.get()
    best, running, failed = (
        next(line for line in text.splitlines() if line.startswith(f"000{n}")) for n in (0, 3, 2)
    )
    assert best.split() == ["0000", "0.5", "2", "3/3", "400", "0.4100", "15", "best"]
    assert running.split() == ["0003", "0.8", "2", "1/3", "160", "0.4567", "0.2500", "5", "running"]
    assert "not finite" in failed
    assert "3/24 trials done, 1 running, best accuracy 0.4100 (0000)" in text
    # 5 pictures a second; of 21 trials to come each takes as long as those that ended did.
    left_s = (240 + 20 * 500 // 3) / 5
    assert f"about {int(left_s) // 60} min" in text


def test_elsewhere__a_line_for_each_score_once(capsys: pytest.CaptureFixture[str]) -> None:
    table = SweepTable(Progress(Console(file=io.StringIO())), PLAN)
    for _ in range(3):
        table(RECORD, {}, ["slow disk"])
    lines = capsys.readouterr().err.splitlines()
    scores = [line for line in lines if line.startswith("trial ")]
    assert len(scores) == len(set(scores)) == 5
    assert scores[2] == (
        "trial 0000 mask_ratio=0.5 decoder_depth=2: accuracy 0.4100 after 400 pictures"
    )
