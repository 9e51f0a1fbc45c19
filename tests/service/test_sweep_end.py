"""The lines at the end of `mimray tune`."""

from __future__ import annotations

import pytest

from mimray.service.commands import tune
from mimray.tuning.record import FinalScore, Rung, SweepRecord, TrialRecord


def test_end__says_no_score_of_an_earlier_winner(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = tuple(
        TrialRecord(
            number=number, params={"seed": number}, state="finished",
            rungs=(Rung(number=0, step=1, samples=8, score=score, train_s=1, score_s=1),),
        )
        for number, score in enumerate((0.6, 0.9))
    )  # fmt: skip
    lines: list[str] = []
    monkeypatch.setattr(tune, "say", lambda text, **_: lines.append(text))
    for winner in (0, 1):
        final = FinalScore(
            trial=winner,
            rungs=1,
            headline=0.5,
            standard_error=0.1,
            num_val=5,
            place="the test split",
        )
        record = SweepRecord(
            name="s", uri="u", config={"space": {}}, keys=("seed",), metric="accuracy",
            rung_samples=(8,), data="d", data_fingerprint="f", score_data="d", seed=0, command="",
            trials=trials, ended=True, final=final,
        )  # fmt: skip
        lines.clear()
        tune._print_end(record, "1 s", [], "runs")
        said = [line for line in lines if line.startswith("report:")]
        assert len(said) == winner
        assert any(line.startswith("best: trial 0001") for line in lines)
    assert "0.5000 ± 0.1000 on 5 pictures" in said[0]
