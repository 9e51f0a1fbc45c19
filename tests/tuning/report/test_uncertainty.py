"""Standard errors, ties and the winner's own score in every part of a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mimray.trainers.evaluation.uncertainty import of_accuracy
from mimray.trainers.storage import RunDir
from mimray.tuning.record import FinalScore, Rung, SweepRecord, TrialRecord, repeat_number
from mimray.tuning.report import figures, write_report
from mimray.tuning.report.summary import summarise
from mimray.tuning.report.tables import leaderboard, notes

CROP, PAIRS = "data.crop_scale", ((0.2, 1.0), (0.6, 1.0))
NUM = 120
PLACES = np.arange(NUM)


def trial(number: int, right: np.ndarray, **kept: Any) -> TrialRecord:
    evidence = of_accuracy(right, "v", PLACES)
    rung = Rung(
        number=0, step=40, samples=400, score=float(right.mean()), train_s=10, score_s=2,
        standard_error=evidence.standard_error, num_pictures=NUM, evidence=evidence.as_json(),
    )  # fmt: skip
    params = {CROP: PAIRS[number % 2], "optim.weight_decay": {"start": 0.04, "end": 0.4}}
    made = {"state": "finished", "loss": 0.5, **kept}
    return TrialRecord(number=number, params=params, rungs=(rung,), samples=400, **made)


@pytest.fixture
def sweep() -> SweepRecord:
    """27, 26 and 5 right of 120; the second is best with other seeds, and was reported."""
    trials = (
        trial(0, PLACES < 27),
        trial(1, (PLACES >= 10) & (PLACES < 36)),
        trial(2, PLACES < 5),
        trial(repeat_number(0, 1), PLACES < 20),
        trial(repeat_number(1, 1), PLACES < 26),
        trial(repeat_number(1, 2), PLACES < 24),
    )
    return SweepRecord(
        name="sweep", uri="/runs/sweep", config={"budget": {"unit": "steps"}},
        keys=(CROP, "optim.weight_decay"), metric="accuracy", rung_samples=(400,), data="/data",
        data_fingerprint="f", score_data="/data", seed=0, command="mimray tune", trials=trials,
        ended=True,
        final=FinalScore(
            trial=1, rungs=1, headline=0.2, standard_error=0.0365, num_val=119,
            place="the test split",
        ),
    )  # fmt: skip


def test_leaderboard__says_what_is_not_told_apart(sweep: SweepRecord) -> None:
    table = leaderboard(summarise(sweep))
    rows = [dict(zip(table.head, row, strict=True)) for row in table.rows]
    assert [row["trial"] for row in rows] == ["1", "0", "2"]
    assert [row["score"] for row in rows] == [
        "0.2167 ± 0.0376", "0.2250 ± 0.0381", "0.0417 ± 0.0182",
    ]  # fmt: skip
    assert {row["on pictures"] for row in rows} == {"120"}
    assert rows[0]["less the best"] == "the best"
    assert rows[1]["less the best"] == "+0.0083 ± 0.0363, not told apart"
    assert rows[2]["less the best"].startswith("-0.1750 ± ")
    assert "told apart" not in rows[2]["less the best"]
    assert [row["other seeds"] for row in rows] == [
        "0.2083, sd 0.0118 (2)", "0.1667 (1)", "",
    ]  # fmt: skip
    assert rows[0]["crop_scale"] == "(0.6, 1)"
    assert rows[0]["weight_decay"] == "{start: 0.04, end: 0.4}"


def test_report__gives_the_winners_own_score_in_page_text_and_data(
    sweep: SweepRecord, tmp_path: Path
) -> None:
    write_report(sweep, RunDir(str(tmp_path)))
    kept = "0.2000 ± 0.0365 on 119 pictures kept from the choice: the test split"
    text = (tmp_path / "report.md").read_text()
    assert kept in text
    assert "chosen by 0.2083 on 120 pictures, the mean of other seeds (2)." in text
    assert "Not told apart from the best: trial 0." in text
    page = " ".join((tmp_path / "report.html").read_text().split())
    assert "0.2000 ± 0.0365<small>" in page
    assert "on 119 pictures kept from the choice</small>" in page
    assert "<dt>Kept from the choice</dt><dd>the test split</dd>" in page
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["final"]["headline"] == 0.2
    assert data["ranked"][1]["against_best"]["told_apart"] is False
    assert data["ranked"][0]["standard_error"] == pytest.approx(0.0376, abs=1e-4)
    assert data["ranked"][0]["other_seeds"]["mean"] == pytest.approx(50 / 240)


def test_plots__have_error_bars_of_one_standard_error(sweep: SweepRecord) -> None:
    summary = summarise(sweep)
    drawn = [figures.score_curves(summary), figures.against_compute(summary, "samples", "seen")]
    errors = {t.rungs[0].standard_error for t in summary.ranked}
    for plot in drawn:
        assert plot is not None
        bars = [e for trace in plot.figure.data for e in trace.error_y.array or ()]
        assert set(bars) == errors
    assert len(summary.points) == 3  # repeats are no points of the search


def test_report__without_a_part_for_it_says_that_its_score_is_too_high(
    sweep: SweepRecord,
) -> None:
    bare = sweep.model_copy(update={"final": None})
    assert any("largest of 3 scores" in note for note in notes(summarise(bare)))
    assert not any("largest of" in note for note in notes(summarise(sweep)))
    # After a larger budget the winner may be another.
    assert sweep.final is not None
    other = sweep.model_copy(update={"final": sweep.final.model_copy(update={"trial": 2})})
    assert summarise(other).record.final is None


def test_report__of_a_record_without_errors_is_as_it_was(sweep: SweepRecord) -> None:
    old = {"standard_error": None, "num_pictures": None, "evidence": None}
    trials = tuple(
        t.model_copy(update={"rungs": tuple(r.model_copy(update=old) for r in t.rungs)})
        for t in sweep.trials[:3]
    )
    summary = summarise(sweep.model_copy(update={"trials": trials, "final": None}))
    assert "on pictures" not in leaderboard(summary).head
    assert [row[6] for row in leaderboard(summary).rows] == ["0.2250", "0.2167", "0.0417"]
