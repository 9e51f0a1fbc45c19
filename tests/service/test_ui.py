"""`mimray ui`: both pages answer, on the loopback alone, and nothing stays behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

import optuna
import psutil
import pytest
from click.testing import CliRunner

from mimray.service.cli.main import cli
from mimray.trainers.storage import RunDir
from mimray.trainers.tracking import Tracker
from mimray.tuning.record import SWEEP, SweepRecord


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep as it lies on disk, tracked in SQLite."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "runs"
    (folder / "photos").mkdir(parents=True)
    place = f"sqlite:///{folder}/photos/study.db"
    optuna.create_study(study_name="photos", storage=place)
    record = SweepRecord(
        name="photos", uri=str(folder / "photos"), config={}, keys=(), metric="accuracy",
        rung_samples=(8,), data="d", data_fingerprint="f", score_data="d", seed=0, command="c",
        study=("photos", place),
    )  # fmt: skip
    RunDir(record.uri).write(SWEEP, record.model_dump_json(exclude={"trials"}).encode())
    tracker = Tracker.open(
        None, experiment="mimray", run_name="photos", storage=str(folder), params={}, tags={}
    )
    tracker.finish()
    return folder


@pytest.fixture
def two_free_ports(free_port: Callable[[], int]) -> int:
    """The first of two neighbours."""
    while True:
        port = free_port()
        with socket.socket() as other, contextlib.suppress(OSError):
            other.bind(("127.0.0.1", port + 1))
            return port


def test_ui__serves_mlflow_and_the_study_and_leaves_nothing(
    storage: Path, two_free_ports: int
) -> None:
    port = two_free_ports
    command = [
        sys.executable, "-m", "service", "ui", "--sweep", "photos", "--storage", str(storage),
        "--port", str(port),
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    assert process.stderr is not None
    try:
        said = ""
        while "Ctrl-C" not in said:
            line = process.stderr.readline()
            assert line, f"it ended: {said}"
            said += line
        assert "tensorboard --logdir" in said
        for page in (port, port + 1):
            assert urlopen(f"http://127.0.0.1:{page}", timeout=120).status == 200
        family = psutil.Process(process.pid).children(recursive=True)
        listening = [c.laddr.ip for p in family for c in p.net_connections("tcp")
                     if c.status == psutil.CONN_LISTEN]  # fmt: skip
        assert set(listening) == {"127.0.0.1"}
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
        deadline = time.monotonic() + 120
        while any(child.is_running() and child.status() != "zombie" for child in family):
            assert time.monotonic() < deadline, "a server outlives the command"
            time.sleep(0.1)
    finally:
        process.kill()


def test_ui__says_what_is_missing(storage: Path, tmp_path: Path) -> None:
    def refused(*arguments: str) -> str:
        result = CliRunner().invoke(cli, ["ui", *arguments])
        assert result.exit_code == 2
        return result.stderr

    assert "no sweep 'other'" in refused("--sweep", "other", "--storage", str(storage))
    assert "nothing is tracked" in refused("--storage", str(tmp_path / "empty"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert "is taken" in refused("--storage", str(storage), "--port", port)
