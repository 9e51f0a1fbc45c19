"""MLflow's view of runs that another machine launched."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from mlflow import MlflowClient

from mimray.service.commands.collect import collect
from mimray.trainers.engine.metrics import MetricsLog
from mimray.trainers.recorder import LAUNCH, Launch
from mimray.trainers.storage import RunDir
from tests.trainers.runs import small_plan


def make_run(run: RunDir, last_step: int, status: str) -> None:
    plan = small_plan()
    run.create()
    run.write("plan.json", plan.model_dump_json().encode())
    launch = Launch("l1", "host", "10.0.0.1:6379", "mimray pretrain", 1000.0, status)  # type: ignore[arg-type]
    run.write(LAUNCH, json.dumps(asdict(launch)).encode())
    log = MetricsLog(run, 0)
    for step in range(1, last_step + 1):
        log.append({"step": step, "time": 1000.0 + step, "loss": 1 / step})
    log.flush()


def shown(uri: str) -> dict[str, tuple[str, list[tuple[int, int, float]]]]:
    """Status and points of each run, by name."""
    client = MlflowClient(uri)
    found = {}
    for run in client.search_runs([client.get_experiment_by_name("mimray").experiment_id]):
        history = client.get_metric_history(run.info.run_id, "loss")
        points = [(point.step, point.timestamp, point.value) for point in history]
        found[run.info.run_name] = run.info.status, points
    return found


def test_collect__shows_runs_of_other_machines_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage, uri = tmp_path / "runs", f"sqlite:///{tmp_path / 'here.db'}"
    make_run(RunDir(str(storage / "done")), 3, "FINISHED")
    make_run(RunDir(str(storage / "under-way")), 1, "")
    (storage / "data").mkdir()
    (storage / "damaged").mkdir()
    (storage / "damaged/plan.json").write_text("{")
    named: list[str] = []

    with caplog.at_level(logging.WARNING):
        assert collect(str(storage), uri, named.append) == 2
    assert named == ["damaged", "done", "under-way"]
    assert re.search(r"damaged is left out: .*plan\.json is not JSON", caplog.text)
    points = [(step, 1_000_000 + 1000 * step, 1 / step) for step in (1, 2, 3)]
    assert shown(uri) == {"done": ("FINISHED", points), "under-way": ("RUNNING", points[:1])}

    make_run(RunDir(str(storage / "under-way")), 2, "FAILED")
    assert collect(str(storage), uri, named.append) == 2
    assert shown(uri) == {"done": ("FINISHED", points), "under-way": ("FAILED", points[:2])}
