"""Versions of the registry, as text."""

from __future__ import annotations

from typing import Any

from mimray.service.commands.models import _sweep_scores, version_text, versions_text
from mimray.tuning.record import FinalScore, Rung, SweepRecord, TrialRecord

ROW: dict[str, Any] = {
    "model": "photos@v2",
    "name": "photos",
    "version": 2,
    "aliases": ["best", "champion"],
    "method": "mae",
    "source": "",
    "scores": {"knn": {"metric": "accuracy", "headline": 0.25}},
}


def test_versions__a_line_each() -> None:
    other = {**ROW, "model": "photos@v1", "aliases": [], "scores": {}}
    assert versions_text([ROW, other]).splitlines() == [
        "photos@v2 @best @champion  mae  knn 0.2500",
        "photos@v1  mae",
    ]


def test_version__a_line_a_fact_without_empty_ones() -> None:
    assert [line.split() for line in version_text(ROW).splitlines()] == [
        ["model", "photos@v2"],
        ["name", "photos"],
        ["version", "2"],
        ["aliases", "best", "champion"],
        ["method", "mae"],
        ["knn", "accuracy", "0.2500"],
    ]


def test_scores__stand_with_error_number_of_pictures_and_the_choice() -> None:
    score = {"metric": "accuracy", "headline": 0.2, "standard_error": 0.0365, "num_val": 120}
    chosen = {"headline": 0.25, "standard_error": 0.0395, "num_val": 121}
    winner = {**ROW, "scores": {"knn": {**score, "part": "report", "chosen_by": chosen}}}
    assert version_text(winner).splitlines()[-1] == (
        "knn              accuracy 0.2000 ± 0.0365 on 120 pictures kept from the choice; "
        "chosen by 0.2500 ± 0.0395 on 121 pictures"
    )
    other = {**ROW, "scores": {"knn": {**score, "part": "choice"}}}
    assert version_text(other).endswith("on 120 pictures that the trial was chosen by")
    assert versions_text([other]).endswith("knn 0.2000 ± 0.0365 on 120 pictures")


def test_lineage__has_the_winners_own_score_beside_the_one_it_won_by() -> None:
    rung = Rung(
        number=0, step=1, samples=8, score=0.25, train_s=1, score_s=1, standard_error=0.0395,
        num_pictures=120,
    )  # fmt: skip
    trial = TrialRecord(number=3, params={}, rungs=(rung,), state="finished")
    final = FinalScore(
        trial=3, rungs=1, headline=0.2, standard_error=0.0365, num_val=119, place="test"
    )
    sweep = SweepRecord(
        name="s", uri="u", config={}, keys=(), metric="accuracy", rung_samples=(8,), data="d",
        data_fingerprint="f", score_data="d", seed=0, command="", trials=(trial,), final=final,
    )  # fmt: skip
    assert _sweep_scores(sweep, trial) == {
        "sweep_score": "accuracy 0.2000 ± 0.0365 on 119 pictures kept from the choice",
        "sweep_chosen_by": "accuracy 0.2500 ± 0.0395 on 120 pictures",
    }
    better = rung.model_copy(update={"score": 0.5})
    other = trial.model_copy(update={"number": 4, "rungs": (better,)})
    assert _sweep_scores(sweep, other.model_copy(update={"rungs": ()})) == {}
    both = sweep.model_copy(update={"trials": (trial, other)})
    assert _sweep_scores(both, trial) == {}  # it was chosen by nothing
    chosen_by = "accuracy 0.5000 ± 0.0395 on 120 pictures"
    assert _sweep_scores(both, other) == {"sweep_chosen_by": chosen_by}
