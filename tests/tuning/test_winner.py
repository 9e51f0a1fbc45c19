"""The winner's own score, repeats with other seeds, equal compute; Ray's part is played here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image
from ray.tune.search import Searcher

from mimray.trainers.errors import ConfigError, DataError, RunConflictError
from mimray.trainers.evaluation.score import Part, Setting
from mimray.trainers.evaluation.splits import open_splits
from mimray.tuning import winner
from mimray.tuning.capacity import Capacity
from mimray.tuning.config import Repeats, ScoreConfig
from mimray.tuning.plan import SweepPlan, check_continues, new_record, parse_sweep, remembered
from mimray.tuning.record import (
    SWEEP,
    TRIAL,
    FinalScore,
    Rung,
    SweepRecord,
    TrialRecord,
    read_record,
    repeat_number,
    trial_dir,
    trial_name,
)
from mimray.tuning.recorder import SweepRecorder
from mimray.tuning.report.summary import summarise
from mimray.tuning.score import Scored, check_score, report_place, score_bundle
from mimray.tuning.search import Repeated
from mimray.tuning.trial import LaunchContext

Small = Callable[..., SweepPlan]


def scored(number: int, score: float, **kept: Any) -> TrialRecord:
    rung = Rung(number=2, step=8, samples=64, score=score, train_s=1, score_s=1, num_pictures=8)
    return TrialRecord(number=number, params={"k": number % 10}, rungs=(rung,), **kept)


def record_of(plan: SweepPlan, *trials: TrialRecord) -> SweepRecord:
    return new_record(plan, ("", "")).model_copy(update={"trials": trials})


def test_part__no_picture_is_in_both_and_each_class_is_in_each() -> None:
    labels = np.repeat(np.arange(5), [40, 30, 20, 6, 4])
    parts = {
        name: Part(name, 0.5, seed=3).indices(100, labels, "d")  # type: ignore[arg-type]
        for name in ("choice", "report")
    }
    assert sorted(np.concatenate(list(parts.values()))) == list(range(100))
    for part in parts.values():
        assert np.bincount(labels[part]).tolist() == [20, 15, 10, 3, 2]
        assert (np.diff(part) > 0).all()
    again = Part("report", 0.5, seed=3).indices(100, labels, "d")
    assert (again == parts["report"]).all()
    assert not (Part("report", 0.5, seed=4).indices(100, labels, "d") == again).all()
    assert len(Part("report", 0.2, seed=0).indices(11, None, "d")) == 2
    with pytest.raises(DataError, match=r"2 pictures of d are too few.*30%"):
        Part("report", 0.3, seed=0).indices(2, None, "d")


def classes(folder: Path, *splits: str) -> Path:
    for number, split in enumerate(splits):
        for label in ("a", "b"):
            place = folder / split / label
            place.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (8, 8), (number, i, ord(label))).save(place / f"{i}.png")
    return folder


def setting(data: Path, part: Part | None, val: str | None = None) -> Setting:
    return Setting(str(data), val, None, 0, False, "cpu", data, lambda *_: None, part=part)


def test_parts__of_data_with_three_splits_are_its_own(tmp_path: Path) -> None:
    three = classes(tmp_path / "three", "train", "val", "test")
    two = classes(tmp_path / "two", "train", "val")
    whole = open_splits(setting(three, None)).val
    choice, report = (Part(name, 0.5, 0) for name in ("choice", "report"))  # type: ignore[arg-type]
    assert open_splits(setting(three, choice)).val.facts.fingerprint == whole.facts.fingerprint
    assert "/test/" in open_splits(setting(three, report)).val.name(0)
    # A place that is named is halved, whatever lies beside it: it may be the test split itself.
    for data, val in ((two, None), (three, str(three / "test"))):
        found = [open_splits(setting(data, part, val)).val for part in (choice, report)]
        names = [{source.name(i) for i in range(len(source))} for source in found]
        assert [len(n) for n in names] == [4, 4]
        assert not names[0] & names[1]
        assert all(set(source.labels().tolist()) == {0, 1} for source in found)  # type: ignore[union-attr]


def test_place__of_the_report_is_named(small: Small, tmp_path: Path) -> None:
    three = classes(tmp_path / "three", "train", "val", "test")
    config = small().config.score
    assert report_place(config, str(three)) == f"the test split of {three}"
    assert "50% of the pictures" in report_place(config.model_copy(update={"val": "v"}), str(three))
    assert report_place(config.model_copy(update={"report": "r"}), str(three)) == "r"


def test_too_few_pictures__are_refused_before_the_start(small: Small) -> None:
    with pytest.raises(DataError, match=r"16 pictures .* too few to keep 5% .*report_share=0"):
        small("score.report_share=0.05")
    small("score.report_share=0")


def test_report__of_pictures_that_are_not_unseen_is_refused(small: Small, tmp_path: Path) -> None:
    two = classes(tmp_path / "two", "train", "val")
    other = classes(tmp_path / "other", "test")
    for report, what in (
        (two / "val", "trials are chosen by them"),
        (two / "train", "the score learns from them"),
    ):
        config = ScoreConfig(report=str(report))
        said = rf"8 of 8 .* such as .*png, are not unseen: {what}.*score\.report_share"
        with pytest.raises(DataError, match=said):
            check_score(config, str(two), 0)
    check_score(ScoreConfig(report=str(other / "test")), str(two), 0)
    elsewhere = ScoreConfig(data=str(other), val=str(other / "test"), report=str(two / "train"))
    with pytest.raises(DataError, match="trials train on them"):
        check_score(elsewhere, str(two), 0)
    ranked = ScoreConfig(task="rankme", report=str(two / "val"))
    with pytest.raises(DataError, match="trials are chosen by them"):
        check_score(ranked, str(two), 0)


@pytest.mark.parametrize("task", ["segmentation", "dense-knn"])
def test_report__of_masks_is_checked_and_classes_may_differ_between_pictures(
    task: Literal["segmentation", "dense-knn"], tmp_path: Path
) -> None:
    for split, values in (("train", (1, 2, 3)), ("val", (3, 1)), ("test", (2, 1))):
        for number, value in enumerate(values):
            mask = np.zeros((4, 4), np.uint8)
            mask[0] = value
            for kind, pixels in (("images", np.zeros((4, 4, 3), np.uint8)), ("masks", mask)):
                (tmp_path / split / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(tmp_path / split / kind / f"{number}.png")
    trained = str(tmp_path / "train/images")
    config = ScoreConfig(task=task, data=str(tmp_path))
    check_score(config, trained, 0)
    check_score(config.model_copy(update={"report": str(tmp_path / "test")}), trained, 0)
    for split, purpose in (("val", "trials are chosen by"), ("train", "the score learns from")):
        with pytest.raises(DataError, match=f"{purpose} them"):
            check_score(config.model_copy(update={"report": str(tmp_path / split)}), trained, 0)


def test_record__repeats_order_the_best_and_enter_no_search() -> None:
    trials = (
        scored(0, 0.6, state="finished"),
        scored(1, 0.5, state="finished"),
        scored(2, 0.4, state="finished"),
        scored(repeat_number(0, 1), 0.30, state="finished"),
        scored(repeat_number(0, 2), 0.36, state="finished"),
        scored(repeat_number(1, 1), 0.45, state="finished"),
        scored(repeat_number(1, 2), 0.9, state="cut"),
    )
    plan: Any = {
        "name": "s", "uri": "u", "config": {}, "keys": ("k",), "metric": "accuracy",
        "rung_samples": (64,), "data": "d", "data_fingerprint": "f", "score_data": "d",
        "seed": 0, "command": "", "trials": trials,
    }  # fmt: skip
    record = SweepRecord.model_validate(plan)
    assert [t.number for t in record.found()] == [0, 1, 2]
    assert record.repeated(0) == [0.30, 0.36]
    assert [t.number for t in record.ranked()] == [1, 0, 2]  # 0.45 over 0.33, then by the search
    assert record.best is not None
    assert record.best.number == 1
    assert record.chosen_by(record.best) == {
        "headline": 0.45, "standard_error": None, "num_seeds": 1, "num_val": 8,
    }  # fmt: skip
    assert record.chosen_by(trials[2])["headline"] == 0.4  # not repeated: by its last score
    final = FinalScore(trial=1, rungs=1, headline=0.3, standard_error=None, num_val=8, place="p")
    for trial, rungs, reported in ((1, 1, True), (0, 1, False), (1, 2, False)):
        kept = final.model_copy(update={"trial": trial, "rungs": rungs})
        found = record.model_copy(update={"final": kept})
        assert found.reported == (kept if reported else None)
        summary = summarise(found)
        assert summary.record.final == found.reported
        assert summary.chosen_by == record.chosen_by(record.best)
    assert trial_name(7) == "0007"
    assert trial_name(repeat_number(7, 2)) == "0007-seed2"
    assert trials[4].repeats == 0
    assert trials[0].repeats is None


def test_repeats__are_listed_once_and_go_on_after_a_cut(small: Small) -> None:
    plan = small("repeats={seeds: 2, best: 2}", "seed=5")
    trials = [scored(n, s, state="finished") for n, s in ((0, 0.1), (1, 0.5), (2, 0.3))]
    search = Repeated(plan.config, record_of(plan, *trials))
    found = []
    while (given := search.suggest("t")) != Searcher.FINISHED:
        found.append(given)
    assert [trial_name(f["number"]) for f in found] == [
        "0001-seed1", "0001-seed2", "0002-seed1", "0002-seed2",
    ]  # fmt: skip
    assert [f["params"] for f in found[:2]] == [{"k": 1, "seed": 6}, {"k": 1, "seed": 7}]
    assert search.exhausted
    later = [
        scored(repeat_number(1, 1), 0.2, state="finished"),
        scored(repeat_number(1, 2), 0.2, state="cut"),
    ]
    twin = scored(11, 0.4, state="finished")  # drawn twice, it is one
    assert twin.params == trials[1].params
    again = Repeated(plan.config, record_of(plan, *trials, twin))
    assert [w["number"] for w in again._wanted] == [f["number"] for f in found]
    left = Repeated(plan.config, record_of(plan, *trials, *later))
    assert [trial_name(f["number"]) for f in left._wanted] == [
        "0001-seed2", "0002-seed1", "0002-seed2",
    ]  # fmt: skip
    assert parse_sweep({**plan.config.model_dump(), "repeats": 3}, "s").repeats == Repeats(seeds=3)


def test_repeat__is_the_trial_with_another_seed(small: Small) -> None:
    plan = small()
    params = {"method.mask_ratio": 0.5, "method.decoder_depth": 1}
    one, other = plan.trial(params), plan.trial({**params, "seed": 3})
    assert (one.recipe.seed, other.recipe.seed) == (0, 3)
    assert one.recipe.model_copy(update={"seed": 3}) == other.recipe


class Recorder:
    """The recorder's handle, of an object at hand."""

    def __init__(self, inner: SweepRecorder) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._inner, name))


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Scorings that were asked for; each gives 0.25 on 8 pictures."""
    asked: list[dict[str, Any]] = []

    def score(bundle: Any, *_: Any, **about: Any) -> Scored:
        asked.append({"bundle": bundle.uri, **about})
        return Scored(0.25, {}, 1.0, 0.1531, 8, None)

    def remote(function: Callable[..., Any]) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=function))

    monkeypatch.setattr(winner, "score_bundle", score)
    played_ray = SimpleNamespace(remote=remote, get=lambda x: x, exceptions=winner.ray.exceptions)
    monkeypatch.setattr(winner, "ray", played_ray)
    return asked


def context(plan: SweepPlan, recorder: SweepRecorder) -> LaunchContext:
    return LaunchContext(plan, Capacity(1, 1, 0.0, 1, ""), Recorder(recorder), "launch", 0)


def test_winner__is_scored_once_on_the_pictures_kept_from_the_choice(
    small: Small, played: list[dict[str, Any]]
) -> None:
    plan = small()
    plan.directory.create()
    for number, score in ((0, 0.5), (1, 0.75)):
        trial = scored(number, score, state="finished")
        trial_dir(plan.directory, number).create()
        trial_dir(plan.directory, number).write(TRIAL, trial.model_dump_json().encode())
    bundle = trial_dir(plan.directory, 1) / "bundle"

    def launch() -> SweepRecord:
        trials = [scored(0, 0.5, state="finished"), scored(1, 0.75, state="finished")]
        known = read_record(plan.directory) if plan.directory.exists(SWEEP) else None
        record = (known or record_of(plan)).model_copy(update={"trials": tuple(trials)})
        recorder = SweepRecorder(record=record.model_dump_json(), storage=plan.uri, tracked=False)
        winner.report_winner(context(plan, recorder), record)
        notes = recorder.snapshot()[2]
        assert any("no bundle" in note for note in notes) != bundle.exists("bundle.json")
        return recorder.close(True, "FINISHED")

    assert launch().final is None  # it has no bundle yet; the sweep says so and goes on
    assert not played
    bundle.create()
    bundle.write("bundle.json", b"{}")
    final = launch().final
    assert final == FinalScore(
        trial=1, rungs=1, headline=0.25, standard_error=0.1531, num_val=8,
        place=report_place(plan.config.score, plan.facts.uri),
    )  # fmt: skip
    (asked,) = played
    assert asked["part"] == "report"
    assert asked["chosen_by"] == {"headline": 0.75, "standard_error": None, "num_val": 8}
    assert launch().final == final  # read again
    assert len(played) == 1
    assert read_record(plan.directory).final == final


def test_records__of_earlier_versions_go_on_and_choose_by_all_pictures(small: Small) -> None:
    plan = small()
    tree = json.loads(new_record(plan, ("", "")).model_dump_json())
    for section, key in (("score", "report_share"), ("score", "report"), ("budget", "unit")):
        del tree["config"][section][key]
    del tree["config"]["repeats"], tree["final"]
    old = SweepRecord.model_validate(tree)
    config = remembered(plan.directory, old)
    assert config.score.report_share == 0
    check_continues(small("score.report_share=0"), old)
    with pytest.raises(RunConflictError, match=r"report_share: 0\.0 -> 0\.5"):
        check_continues(plan, old)
    old_rung = {"number": 0, "step": 1, "samples": 8, "score": 0.5, "train_s": 1, "score_s": 1}
    rung = Rung.model_validate(old_rung)
    assert (rung.place, rung.figure.standard_error) == (8, None)
    check_continues(small("repeats=2"), new_record(plan, ("", "")))  # repeats may come later


def test_flops__a_cheaper_trial_sees_more_pictures_for_the_same_compute(small: Small) -> None:
    plan = small("budget.unit=flops", "budget.steps=400")
    assert plan.flops is not None
    params = {"method.mask_ratio": 0.75, "method.decoder_depth": 1}
    spent = {}
    for depth in (1, 2):
        trial = plan.trial({**params, "method.decoder_depth": depth})
        pauses = plan.pauses(trial)
        assert list(pauses.values()) == [0, 1, 2]
        assert list(pauses)[-1] == trial.steps
        assert list(pauses)[0] == pytest.approx(trial.steps / 4, abs=1)
        spent[depth] = trial.num_samples
    assert spent[1] > 1.05 * spent[2]
    from mimray.tuning.compute import training_flops

    flops = [
        spent[depth] * training_flops(plan.trial({**params, "method.decoder_depth": depth}))
        for depth in (1, 2)
    ]
    assert flops[0] == pytest.approx(flops[1], rel=0.01)
    assert flops[0] == pytest.approx(plan.flops * plan.rung_samples[-1], rel=0.01)
    with pytest.raises(ConfigError, match="fewer than 3 rungs"):
        small(
            "budget.unit=flops", "budget.steps=4", "space.method.decoder_depth=null",
            "space.encoder.depth={grid: [12]}",
        )  # fmt: skip


def test_score__parts_are_other_pictures_and_the_card_has_both_figures(
    labelled: Path, tmp_path: Path, small: Small
) -> None:
    from mimray.trainers.bundles import BundleCard, read_card, save_bundle
    from mimray.trainers.config.model import ViTConfig
    from mimray.trainers.evaluation.features.encoders import untrained
    from mimray.trainers.storage import RunDir

    shape = ViTConfig(name="vit", width=16, depth=1, num_heads=2, patch_size=8)
    card = BundleCard(
        name="t", encoder=shape, image_size=(16, 16), channels=3, mean=(0.5,) * 3, std=(0.2,) * 3
    )
    folder = tmp_path / "bundle"
    save_bundle(folder, card, untrained(card).encoder.state_dict())
    config, place = small().config.score, RunDir(str(folder))
    found = {}
    for part in ("choice", "report"):
        chosen = {"headline": 0.5, "standard_error": 0.1, "num_val": 8} if found else None
        found[part] = score_bundle(
            place, config, str(labelled), seed=0, device="cpu", command="c",
            part=part, chosen_by=chosen,  # type: ignore[arg-type]
        )  # fmt: skip
        kept = read_card(folder).scores["knn"]
        assert kept["part"] == part
        assert kept["num_val"] == 8
        assert kept["standard_error"] == found[part].standard_error
    assert kept["chosen_by"]["headline"] == 0.5
    assert found["choice"].evidence is not None
    assert found["report"].evidence is not None
    assert found["choice"].evidence["pictures"] != found["report"].evidence["pictures"]
    assert (folder / "evaluation" / "knn-report.json").is_file()
