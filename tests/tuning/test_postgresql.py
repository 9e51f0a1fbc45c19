"""A study in a real PostgreSQL, which several machines can reach."""

from __future__ import annotations

import logging
import os
import pwd
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest.mock import ANY

import optuna
import pytest

from mimray.trainers.errors import RunConflictError, StorageError
from mimray.tuning.config import SweepConfig
from mimray.tuning.record import Rung, TrialRecord
from mimray.tuning.search import SAMPLES, SCORE, Suggestions
from mimray.tuning.study import open_study, study_errors

TPE = [
    "searcher={name: optuna, num_startup_trials: 2}", "budget.trials=4",
    "space.method.mask_ratio={uniform: [0.2, 0.9]}", "space.method.decoder_depth={choice: [1, 2]}",
]  # fmt: skip


def _binaries() -> Path:
    """Where initdb and postgres are; Debian keeps them off the path."""
    folders = [
        *Path("/usr/lib/postgresql").glob("*/bin"),
        Path(shutil.which("initdb") or "/").parent,
    ]
    for folder in folders:
        if (folder / "initdb").is_file():
            return folder
    if os.environ.get("CI"):
        pytest.fail("PostgreSQL is not installed")
    pytest.skip("PostgreSQL is not installed")


class Database(NamedTuple):
    """An empty database of a server of its own."""

    url: str
    start: Callable[[], None]
    stop: Callable[[], None]


@pytest.fixture(scope="module")
def database(free_port: Callable[[], int]) -> Iterator[Database]:
    """A server that can be stopped and started."""
    binaries = _binaries()
    # Another user gets in here; pytest keeps its own folders from others.
    folder = Path(tempfile.mkdtemp(prefix="mr-"))
    as_user: list[str] = []
    if os.getuid() == 0:  # which PostgreSQL refuses to run as
        user = pwd.getpwnam("postgres" if _known("postgres") else "nobody")
        os.chown(folder, user.pw_uid, user.pw_gid)
        as_user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    port = free_port()
    control = [*as_user, str(binaries / "pg_ctl"), "-D", f"{folder}/data", "-w"]
    subprocess.run(
        [*as_user, str(binaries / "initdb"), "-D", f"{folder}/data", "-U", "me", "-A", "trust"],
        check=True, capture_output=True, cwd="/",
    )  # fmt: skip
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"

    def start() -> None:
        subprocess.run(
            [*control, "-o", options, "-l", f"{folder}/log", "start"],
            check=True, stdout=subprocess.DEVNULL, cwd="/",
        )  # fmt: skip

    def stop() -> None:
        command = [*control, "-m", "immediate", "stop"]
        subprocess.run(command, check=True, capture_output=True, cwd="/")

    start()
    yield Database(f"postgresql://me@127.0.0.1:{port}/postgres", start, stop)
    stop()
    shutil.rmtree(folder)


def _known(name: str) -> bool:
    return any(entry.pw_name == name for entry in pwd.getpwall())


def test_study__in_postgresql_holds_the_trials_and_goes_on(
    database: Database, configured: Callable[..., SweepConfig]
) -> None:
    config = configured(*TPE)
    done: list[TrialRecord] = []
    for first in (0, 2):
        study = open_study(config, "photos", database.url)
        search = Suggestions(config, study, done, lambda: True, lambda params: None)
        for number in (first, first + 1):
            found = search.suggest(f"t{number}")
            assert found is not None
            assert found["number"] == number
            score = 0.5 + 0.1 * number
            search.on_trial_result(f"t{number}", {SAMPLES: 100, SCORE: score})
            rung = Rung(number=0, step=1, samples=100, score=score, train_s=1, score_s=1)
            record = TrialRecord(
                number=number, params=found["params"], state="finished", rungs=(rung,)
            )
            done.append(record)
            search.ended(record)
    there = optuna.load_study(study_name="photos", storage=database.url)
    assert [(t.params, t.value) for t in there.trials] == [(t.params, t.score) for t in done]
    with pytest.raises(RunConflictError, match="another space"):
        open_study(configured(), "photos", database.url)


def test_study__waits_for_a_server_that_restarts(
    database: Database, configured: Callable[..., SweepConfig], caplog: pytest.LogCaptureFixture
) -> None:
    config = configured(*TPE)
    study = open_study(config, "restarted", database.url)
    search = Suggestions(config, study, [], lambda: True, lambda params: None)
    assert search.suggest("t0") is not None
    database.stop()
    with pytest.raises(StorageError, match="does not answer: .*refused"):
        open_study(config, "restarted", database.url)  # at the start it is told at once

    back = threading.Timer(3, database.start)
    back.start()
    with caplog.at_level(logging.WARNING):
        search.on_trial_result("t0", {SAMPLES: 100, SCORE: 0.5})
    back.join()
    assert "does not answer" in caplog.text
    assert search.suggest("t1") == {"number": 1, "params": ANY}
    there = optuna.load_study(study_name="restarted", storage=database.url)
    assert [trial.intermediate_values for trial in there.trials] == [{100: 0.5}, {}]


def test_study__a_server_that_stays_away_is_named(
    database: Database, configured: Callable[..., SweepConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured("budget.trials=4")
    monkeypatch.setattr("mimray.tuning.study.PATIENCE_S", 0.5)
    study = open_study(config, "away", database.url)
    search = Suggestions(config, study, [], lambda: True, lambda params: None)
    database.stop()
    try:
        with (
            pytest.raises(StorageError, match="does not answer: .*refused") as caught,
            study_errors(database.url),
        ):
            search.suggest("t0")
    finally:
        database.start()
    assert "continues" in (caught.value.hint or "")
