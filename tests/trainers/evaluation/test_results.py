from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from mimray.trainers.bundles import BundleCard, read_card, save_bundle
from mimray.trainers.config.model import ViTConfig
from mimray.trainers.evaluation.features.encoders import untrained
from mimray.trainers.evaluation.results import (
    add_to_card,
    result_of,
    results_folder,
    track_score,
    write_result,
)
from mimray.trainers.evaluation.score import Score
from mimray.trainers.storage import RunDir

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d763f8cf"
    "c000000301010018dd8db00000000049454e44ae426082"
)


def score(headline: float) -> Score:
    metrics = {"AP": headline, "per_class": {"a cat": 0.5, "dog!": None}, "confusion": [[1, 2]]}
    return Score(
        "AP", headline, metrics, "d" * 8, "v" * 8, 10, 5, notes=("no dog in the validation split",),
        pictures={"detection.png": PNG}, files={"head.safetensors": b"weights"},
    )  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> RunDir:
    shape = ViTConfig(name="vit", width=16, depth=1, num_heads=2, patch_size=8)
    card = BundleCard(
        name="t", encoder=shape, image_size=(16, 16), channels=3, mean=(0.5,) * 3, std=(0.2,) * 3,
        step=70,
    )  # fmt: skip
    folder = tmp_path / "runs" / "mine" / "bundle"
    folder.parent.mkdir(parents=True)
    save_bundle(folder, card, untrained(card).encoder.state_dict())
    return RunDir(str(folder))


def test_folder__of_the_run_or_of_a_bundle_that_stands_alone(place: RunDir) -> None:
    assert results_folder(place).uri == f"{place.uri}/evaluation"
    assert place.local is not None
    (place.local.parent / "plan.json").write_text("{}")
    assert results_folder(place).local == place.local.parent / "evaluation"


def test_result__json_pictures_files_and_card(place: RunDir) -> None:
    about = {"task": "detection", "command": "mimray evaluate …", "seed": 3, "data": "d"}
    result = result_of(score(0.25), about)

    pictures = write_result(results_folder(place), "detection", result, score(0.25))
    add_to_card(place, "knn", {**result, "headline": 0.9})
    add_to_card(place, "detection", {**result, "headline": 0.1})
    add_to_card(place, "detection", result)

    folder = results_folder(place).local
    assert folder is not None
    assert json.loads((folder / "detection.json").read_bytes()) == result
    assert pictures == [f"{place.uri}/evaluation/detection.png"]
    assert (folder / "detection" / "head.safetensors").read_bytes() == b"weights"
    assert place.local is not None
    scores = read_card(place.local).scores
    assert {task: found["headline"] for task, found in scores.items()} == {
        "knn": 0.9,
        "detection": 0.25,
    }
    assert scores["detection"]["command"] == "mimray evaluate …"
    assert scores["detection"]["val_fingerprint"] == "v" * 8


def test_track__every_measurement_stands_in_the_runs_own_mlflow_run(
    place: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    assert place.local is not None
    card = read_card(place.local)
    first = track_score(place, card, "detection", score(0.25))
    second = track_score(place, card, "detection", score(0.5))

    assert first == second
    client = MlflowClient()
    history = client.get_metric_history(first, "detection/AP")
    assert [(point.step, point.value) for point in history] == [(70, 0.25), (70, 0.5)]
    assert client.get_run(first).data.metrics["detection/per_class/a cat"] == 0.5
    assert client.get_run(first).info.run_name == "bundle"
