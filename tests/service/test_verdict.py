"""The verdict on an adapted encoder: its rule, its words, what it refuses, and the command."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from mimray.service.cli.main import cli
from mimray.service.commands.judgement import judged, line_of, with_changes
from mimray.trainers.bundles import BundleCard, read_card, save_bundle
from mimray.trainers.config.model import ViTConfig
from mimray.trainers.data.synth import write_scenes
from mimray.trainers.evaluation.features.encoders import untrained
from mimray.trainers.evaluation.uncertainty import Evidence, of_accuracy

NUM = 200


def found(value: float, evidence: Evidence) -> dict[str, Any]:
    error = evidence.standard_error
    return {"headline": value, "standard_error": error, "evidence": evidence.as_json()}


def accuracy(right: int, first: int = 0) -> dict[str, Any]:
    """An encoder that is right on some neighbouring pictures."""
    places = np.arange(NUM)
    hits = (places >= first) & (places < first + right)
    return found(right / NUM, of_accuracy(hits, "v", places))


def miou(value: float, spread: float, seed: int) -> dict[str, Any]:
    """An encoder whose score wavers over resamples, apart from the others'."""
    drawn = value + spread * np.random.default_rng(seed).normal(size=100)
    return found(value, Evidence("bootstrap", "v", NUM, tuple(drawn.tolist())))


def figure(task: str, role: str = "labelled", **encoders: dict[str, Any]) -> dict[str, Any]:
    metrics = {"knn": "accuracy", "dense-knn": "mIoU", "rankme": "RankMe", "cka": "CKA"}
    names = {"knn": "kNN", "dense-knn": "dense kNN"}
    return with_changes(
        {
            "role": role, "task": task, "name": names.get(task, ""), "metric": metrics[task],
            "comparable": task != "cka", "encoders": encoders,
        }
    )  # fmt: skip


# The rule


def knn(adapted: int, start: int, role: str = "labelled") -> dict[str, Any]:
    return figure(
        "knn", role, adapted=accuracy(adapted), start=accuracy(start), untrained=accuracy(5)
    )


def dense(adapted: float, start: float) -> dict[str, Any]:
    scores = {"adapted": adapted, "start": start, "untrained": 0.05}
    return figure("dense-knn", **{n: miou(v, 0.01, i) for i, (n, v) in enumerate(scores.items())})


@pytest.mark.parametrize(
    ("figures", "gain", "reason"),
    [
        ([knn(60, 40)], True, "gained on kNN accuracy"),
        ([knn(60, 40), dense(0.3, 0.3)], True, "gained on kNN accuracy, and lost on none"),
        ([knn(60, 40), dense(0.2, 0.3)], False, "lost on dense kNN mIoU, though gained on kNN"),
        ([knn(43, 40), dense(0.301, 0.3)], False, "kNN accuracy and dense kNN mIoU are not told"),
        ([knn(45, 40)], False, "kNN accuracy is not told apart"),  # 5 of 5 pictures, p = 0.06
        ([knn(46, 40)], True, "gained on kNN accuracy"),  # 6 of 6, p = 0.03
        ([knn(60, 40), knn(40, 60, "retain")], True, "gained on kNN accuracy"),
        ([knn(60, 40, "retain")], None, "without labels"),
        ([], None, "without labels"),
    ],
)
def test_rule__an_interval_above_0_and_none_below(
    figures: list[dict[str, Any]], gain: bool | None, reason: str
) -> None:
    judgement, reasons = judged(figures)
    assert judgement is gain
    assert reasons[0].startswith(reason)


def test_rule__no_proxy_is_a_gain_and_losses_elsewhere_are_told() -> None:
    rank = figure("rankme", "data", **{n: miou(9.0 - i, 0.1, i) for i, n in enumerate(
        ("adapted", "start", "untrained"))})  # fmt: skip
    assert rank["change"]["outcome"] == "rose"
    assert judged([rank])[0] is None
    _, reasons = judged([knn(60, 40), knn(20, 60, "retain")])
    assert reasons[1:] == ["kNN accuracy was lost on the retention set"]
    _, reasons = judged([knn(6, 5)])
    assert reasons[1:] == ["kNN accuracy is not told apart from that of an untrained encoder"]


def test_interval__of_a_bootstrap_is_that_of_the_paired_resamples() -> None:
    one, other = miou(0.30, 0.02, 1), miou(0.25, 0.02, 2)
    change = figure("dense-knn", adapted=one, start=other, untrained=other)["change"]
    resampled = [np.array(each["evidence"]["values"]) for each in (one, other)]
    half = 1.959964 * (resampled[0] - resampled[1]).std()
    assert change["interval"] == pytest.approx((0.05 - half, 0.05 + half))


def test_outcome__is_none_where_no_resample_differs() -> None:
    nothing = found(0.0, Evidence("bootstrap", "v", NUM, (0.0,) * 100))
    same = figure("dense-knn", adapted=nothing, start=nothing, untrained=nothing)
    assert same["change"]["outcome"] == "no interval"
    assert judged([same])[0] is False
    assert "no interval" in line_of(same)


def test_line__both_values_the_difference_its_interval_and_the_outcome() -> None:
    assert line_of(knn(60, 40)).startswith("kNN accuracy 0.2000 -> 0.3000 (+0.1000, 95 % interval")
    assert line_of(knn(60, 40)).endswith("; untrained 0.0250): gained")
    assert line_of(knn(40, 60, "retain")).startswith("retention set, kNN accuracy 0.3000 -> 0.2000")
    alike = figure("cka", "data", adapted=miou(0.9, 0.01, 0), untrained=miou(0.2, 0.01, 1))
    assert "CKA 0.9000 (95 % interval 0.8" in line_of(alike)
    assert judged([alike])[0] is None


# The command, in this process and without Ray


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two encoders, scenes, and a folder of pictures adapted to."""
    place = tmp_path_factory.mktemp("verdict")
    scenes = place / "scenes"
    write_scenes(scenes, num_train=12, num_val=9, image_size=(48, 64), num_classes=3, seed=0)
    for seed in (1, 2):
        bundle(place / f"seed{seed}", seed)
    rng = np.random.default_rng(0)
    for number in range(12):
        picture = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        (place / "own").mkdir(exist_ok=True)
        Image.fromarray(picture).save(place / "own" / f"{number}.png")
    return place


def bundle(folder: Path, seed: int, **card: Any) -> Path:
    shape = ViTConfig(name="vit", width=card.pop("width", 32), depth=2, num_heads=2, patch_size=8)
    whole = BundleCard.model_validate(
        {
            "name": folder.name, "encoder": shape, "image_size": (32, 32), "channels": 3,
            "mean": (0.5,) * 3, "std": (0.25,) * 3, "layers": (0, 1), **card,
        }
    )  # fmt: skip
    save_bundle(folder, whole, untrained(whole, seed=seed).encoder.state_dict())
    return folder


@pytest.fixture(autouse=True)
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of each test's own, no cluster, and no MLflow, whose database takes seconds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("mimray.trainers.evaluation.results.track_score", lambda *_: "")
    for place in ("evaluate.connected_if_larger", "evaluate.connected", "verdict.connected"):
        monkeypatch.setattr(f"mimray.service.commands.{place}", nullcontext)
    monkeypatch.setattr("ray.is_initialized", lambda: False)


def verdict(place: Path, *arguments: str, start: str = "seed1") -> Result:
    names = [str(place / "seed2"), start if ":" in start else str(place / start)]
    return CliRunner().invoke(
        cli, ["verdict", *names, "--data", str(place / "own"), *arguments], catch_exceptions=False
    )


def told(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    tree: dict[str, Any] = json.loads(result.stdout)
    return tree


def test_verdict__by_classes_and_resumed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crops = str(place / "scenes" / "crops")
    asked = ["--labelled", crops, "--retain", str(place / "scenes/train/images"),
             "--set", "k=5", "--out", str(tmp_path / "out"), "--json"]  # fmt: skip
    first = told(verdict(place, *asked))
    figures = {(f["role"], f["task"]): f for f in first["figures"]}
    assert list(figures) == [
        ("labelled", "knn"), ("data", "rankme"), ("retain", "rankme"), ("data", "cka"),
        ("retain", "cka"),
    ]  # fmt: skip
    knn = figures["labelled", "knn"]
    kept = json.loads(Path(knn["results"]["adapted"]).read_text())
    assert kept["headline"] == knn["encoders"]["adapted"]["value"]
    assert kept["config"]["k"] == 5
    assert (knn["change"]["outcome"] == "gained") == bool(first["gain"])
    assert 0 < figures["data", "cka"]["encoders"]["adapted"]["value"] <= 1
    for kind in ("png", "pca"):
        Image.open(first["files"][kind]).verify()
    page = Path(first["files"]["md"]).read_text()
    assert first["reasons"][0] in page
    assert json.loads(Path(first["files"]["json"]).read_text())["gain"] == first["gain"]
    # The adapted card gets the score of the labelled pictures; the start's stays as it was.
    assert read_card(place / "seed2").scores["knn"]["headline"] == kept["headline"]
    assert not read_card(place / "seed1").scores

    def never(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("mimray.service.commands.verdict_figures.evaluate_subjects", never)
    again = told(verdict(place, *asked))
    assert again["figures"] == first["figures"]
    # Another seed is another verdict.
    with pytest.raises(AssertionError, match="measured again"):
        verdict(place, *asked, "--seed", "1")


def test_verdict__without_labels_claims_nothing(place: Path, tmp_path: Path) -> None:
    result = verdict(place, "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.stderr
    last = result.stdout.splitlines()[-1]
    assert last == "verdict: no claim: without labels nothing says that it became better, only " \
        "how it changed"  # fmt: skip
    assert "pictures adapted to, RankMe" in result.stdout


def test_verdict__encoders_of_other_sizes_and_widths_are_compared_where_they_can_be(
    place: Path, tmp_path: Path
) -> None:
    bundle(place / "other", 3, width=48, image_size=(48, 48), channels=1, mean=(0.5,), std=(0.25,))
    asked = ["--labelled", str(place / "scenes/crops"), "--out", str(tmp_path / "out"), "--json"]
    found = told(verdict(place, *asked, start="other"))
    figures = {f["task"]: f for f in found["figures"]}
    assert figures["rankme"]["change"] is None
    assert figures["knn"]["change"]["paired"]
    assert figures["cka"]["encoders"]["adapted"]["interval"] is not None
    said = " ".join(found["notes"])
    assert "32x32 and 48x48 pixels" in said
    assert "start grey ones" in said
    assert "encoders of the same width" in said


def test_verdict__of_a_collapsed_encoder_is_given(place: Path, tmp_path: Path) -> None:
    card = read_card(place / "seed1")
    state = untrained(card).encoder.state_dict()
    save_bundle(tmp_path / "flat", card, {name: value * 0 for name, value in state.items()})
    found = told(
        verdict(place, "--json", "--out", str(tmp_path / "out"), start=str(tmp_path / "flat"))
    )
    (rankme,) = found["figures"]
    assert rankme["encoders"]["start"]["value"] == pytest.approx(1, abs=1e-3)
    assert rankme["change"]["outcome"] == "rose"
    assert any(note.startswith("no CKA") for note in found["notes"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--retain", "own"], "is the data adapted to: its 12 pictures"),
        (["--labelled", "own"], "has no labels: neither masks, boxes nor a class"),
        (["--labelled", "nowhere"], "does not exist"),
        (["--labelled", "scenes", "--task", "knn"], "is labelled by masks (dense-knn, segm"),
        (["--labelled", "scenes", "--set", "colour=3"], "neither of dense-knn, segmentation has"),
        (["--labelled", "scenes/crops", "--set", "kk=3"], "did you mean 'k'?"),
        (["--labelled", "scenes", "--set", "knn.k=3"], "knn is not measured"),
        (["--labelled", "scenes", "--limit", "7"], "of which --limit takes 7, fewer than the 8"),
        (["--limit", "3"], "12 pictures to score rankme on, of which --limit takes 3"),
        (["--set", "k=3"], "k=3: options of tasks go with labelled pictures"),
        (["--task", "knn"], "--task goes with labelled pictures"),
        (["--set", "retain.k=3"], "retain.k=3 goes with a retention set"),
    ],
)
def test_verdict__refuses_in_one_line(
    arguments: list[str], message: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mimray.service.commands.verdict_figures.evaluate_subjects", None)
    monkeypatch.chdir(place)
    result = verdict(place, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("error:") == 1


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("seed2", "hold the same weights: nothing was adapted"),
        ("untrained:vit_tiny", "is measured beside both anyway"),
        ("missing", "no bundle at"),
    ],
)
def test_verdict__refuses_a_start_that_is_none(start: str, message: str, place: Path) -> None:
    result = verdict(place, start=start)
    assert result.exit_code == 2, result.output
    assert message in result.stderr


def test_verdict__copies_of_the_training_pictures_are_the_training_set(
    place: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "copied"
    copied.mkdir()
    for picture in (place / "own").iterdir():
        (copied / picture.name).write_bytes(picture.read_bytes())
    result = verdict(place, "--retain", str(copied))
    assert result.exit_code == 2
    assert "is the data adapted to" in result.stderr
