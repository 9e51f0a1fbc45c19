from __future__ import annotations

import contextlib
import io
import logging
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mimray.trainers.errors import StorageError
from mimray.trainers.tracking import RUN_DIR_TAG, Tracker, flatten, tracking_uri

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)


def open_tracker(storage: Path, **changes: Any) -> Tracker:
    wanted: dict[str, Any] = {
        "experiment": "photos",
        "run_name": "first",
        "storage": str(storage),
        "params": {"method": {"name": "mae", "mask_ratio": 0.75}, "seed": 0},
        "tags": {"mimray.method": "mae"},
    }
    return Tracker.open(None, **wanted | changes)


def history(tracker: Tracker, key: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    points = MlflowClient(tracker.uri).get_metric_history(tracker.run_id, key)
    return [(point.step, point.value) for point in points]


def test_tracker__a_resumed_training_goes_on_in_the_same_run(tmp_path: Path):
    from mlflow import MlflowClient

    first = open_tracker(tmp_path / "runs")
    for step in range(1, 5):
        first.log(step, {"loss": 1 / step})
    first.finish("KILLED")

    # It goes on from a checkpoint at step 2 and with one more worker.
    second = open_tracker(tmp_path / "runs", params={"seed": 0, "world_size": 2})
    for step in range(3, 7):
        second.log(step, {"loss": 1 / step, "knn": step})
    second.finish()

    run = MlflowClient(second.uri).get_run(first.run_id)
    assert second.run_id == first.run_id
    assert history(second, "loss") == [(step, 1 / step) for step in range(1, 7)]
    assert history(second, "knn") == [(step, step) for step in range(3, 7)]
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first"
    assert run.data.params == {
        "method.name": "mae",
        "method.mask_ratio": "0.75",
        "seed": "0",
        "world_size": "2",
    }
    assert run.data.tags["mimray.method"] == "mae"
    assert run.data.tags[RUN_DIR_TAG] == str(tmp_path / "runs" / "first")


def test_tracker__another_directory_or_a_fresh_start_is_another_run(tmp_path: Path):
    first = open_tracker(tmp_path)
    elsewhere = open_tracker(tmp_path, tags={RUN_DIR_TAG: "/it's/elsewhere"})
    again_elsewhere = open_tracker(tmp_path, tags={RUN_DIR_TAG: "/it's/elsewhere"})
    fresh = open_tracker(tmp_path, resume=False)
    resumed = open_tracker(tmp_path)

    assert len({first.run_id, elsewhere.run_id, fresh.run_id}) == 3
    assert again_elsewhere.run_id == elsewhere.run_id
    assert resumed.run_id == fresh.run_id  # the newest


def test_tracker__keeps_everything_inside_the_storage(tmp_path: Path):
    tracker = open_tracker(tmp_path / "runs")
    png = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(png, "PNG")

    tracker.picture("reconstruction", Image.new("RGB", (30, 20), "blue"), 100)
    tracker.picture("reconstruction", png.getvalue(), 200)
    tracker.finish()

    pictures = sorted((tmp_path / "runs" / "mlruns").rglob("images/*.png"))
    steps = [path.name.split("+")[2] for path in pictures]
    assert sorted(steps) == ["100", "200"]
    colours = {Image.open(path).getpixel((0, 0)) for path in pictures}
    assert colours == {(0, 0, 255), (255, 0, 0)}
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert (tmp_path / "runs" / "mlflow.db").exists()


def test_tracker__two_processes_make_the_same_database_at_once(tmp_path: Path):
    script = """
import sys
from mimray.trainers.tracking import Tracker
tracker = Tracker.open(
    None, experiment="photos", run_name=sys.argv[1], storage=sys.argv[2], params={}, tags={}
)
tracker.log(1, {"loss": 0.5})
tracker.finish()
print(tracker.run_id)
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, name, str(tmp_path / "runs")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("left", "right")
    ]
    answers = [process.communicate(timeout=600) for process in processes]

    assert [process.returncode for process in processes] == [0, 0], answers
    assert answers[0][0] != answers[1][0]
    # Not a word on the terminal, schema migrations included.
    assert [stderr for _, stderr in answers] == ["", ""]


def test_tracker__points_wait_for_a_store_that_went_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    tracker = open_tracker(tmp_path)
    database = tmp_path / "mlflow.db"
    database.rename(tmp_path / "away.db")

    with caplog.at_level(logging.WARNING, logger="mimray.trainers.tracking"):
        tracker.log(1, {"loss": 1.0})
    tracker.log(2, {"loss": 0.5})
    (tmp_path / "away.db").rename(database)
    tracker.finish()

    assert "1 point(s) wait" in caplog.text
    assert history(tracker, "loss") == [(1, 1.0), (2, 0.5)]


def test_tracker__a_server_that_does_not_answer_is_a_clear_error():
    with pytest.raises(StorageError, match="no MLflow server answers at http://127.0.0.1:9"):
        Tracker.open(
            "http://127.0.0.1:9", experiment="e", run_name="r", storage="runs", params={}, tags={}
        )


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("sqlite:///damaged.db", "file is not a database"),
        ("sqlite:///other.db", "no such column"),
        ("postgresql+psycopg://me:s3cr3t@127.0.0.1:9/mlflow", "refused"),
        ("mysql+nodriver://127.0.0.1/mlflow", "mysql.nodriver"),
    ],
)
def test_tracker__a_database_that_does_not_open_is_a_clear_error(
    tmp_path: Path, uri: str, reason: str
):
    (tmp_path / "damaged.db").write_bytes(b"not SQLite " * 100)
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as other:
        other.execute("CREATE TABLE runs (what TEXT)")  # of the name of one of MLflow's

    with pytest.raises(StorageError, match=reason) as refusal:
        Tracker.open(uri, experiment="e", run_name="r", storage="runs", params={}, tags={})

    assert "\n" not in str(refusal.value)
    assert "s3cr3t" not in str(refusal.value)


def test_tracker__a_storage_that_is_no_directory_is_a_clear_error(tmp_path: Path):
    (tmp_path / "file").touch()

    with pytest.raises(StorageError, match="cannot write MLflow's database"):
        open_tracker(tmp_path / "file" / "runs")


def test_tracking_uri__asked_then_environment_then_storage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    assert tracking_uri(None, "runs") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert tracking_uri(None, "file:///data/runs") == "sqlite:////data/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking")
    assert tracking_uri(None, "runs") == "http://tracking"
    assert tracking_uri("http://asked", "runs") == "http://asked"


def test_tracking_uri__remote_storage_falls_back_to_this_machine_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, logger="mimray.trainers.tracking"):
        uri = tracking_uri(None, "s3://bucket/runs")

    assert uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert "s3://bucket/runs is remote" in caplog.text


def test_flatten__dots_strings_and_limits():
    flat = flatten({"a": {"b": {"c": 1}}, "layers": (2, 5), "none": None, "long": "x" * 9000})

    assert flat["a.b.c"] == "1"
    assert flat["layers"] == "[2, 5]"
    assert flat["none"] == "None"
    assert len(flat["long"]) == 6000
    assert flat["long"].endswith("x…")


def test_tracker__takes_more_and_longer_params_than_one_call_holds(tmp_path: Path):
    from mlflow import MlflowClient

    params = {f"p{index}": "y" * 7000 for index in range(230)}

    tracker = open_tracker(tmp_path, params=params)

    stored = MlflowClient(tracker.uri).get_run(tracker.run_id).data.params
    assert len(stored) == 230
    assert len(stored["p229"]) == 6000


def test_tracking__import_is_light():
    code = (
        "import sys, mimray.trainers.tracking\n"
        "print('mlflow' in sys.modules or 'torch' in sys.modules)"
    )

    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert answer.stdout == "False\n"
