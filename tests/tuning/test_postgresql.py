"""A study in a real PostgreSQL, which several machines can reach."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest

from mimray.trainers.errors import RunConflictError
from mimray.tuning.config import SweepConfig
from mimray.tuning.record import Rung, TrialRecord
from mimray.tuning.search import SAMPLES, SCORE, Suggestions, open_study


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


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """URL of an empty database of a server of its own."""
    binaries = _binaries()
    # Another user gets in here; pytest keeps its own folders from others.
    folder = Path(tempfile.mkdtemp(prefix="mr-"))
    as_user: list[str] = []
    if os.getuid() == 0:  # which PostgreSQL refuses to run as
        user = pwd.getpwnam("postgres" if _known("postgres") else "nobody")
        os.chown(folder, user.pw_uid, user.pw_gid)
        as_user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    control = [*as_user, str(binaries / "pg_ctl"), "-D", f"{folder}/data", "-w"]
    subprocess.run(
        [*as_user, str(binaries / "initdb"), "-D", f"{folder}/data", "-U", "me", "-A", "trust"],
        check=True, capture_output=True, cwd="/",
    )  # fmt: skip
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
    subprocess.run(
        [*control, "-o", options, "-l", f"{folder}/log", "start"],
        check=True, stdout=subprocess.DEVNULL, cwd="/",
    )  # fmt: skip
    yield f"postgresql://me@127.0.0.1:{port}/postgres"
    subprocess.run([*control, "-m", "immediate", "stop"], check=True, capture_output=True, cwd="/")
    shutil.rmtree(folder)


def _known(name: str) -> bool:
    return any(entry.pw_name == name for entry in pwd.getpwall())


def test_study__in_postgresql_holds_the_trials_and_goes_on(
    database: str, configured: Callable[..., SweepConfig]
) -> None:
    config = configured(
        "searcher={name: optuna, num_startup_trials: 2}", "budget.trials=4",
        "space.method.mask_ratio={uniform: [0.2, 0.9]}",
        "space.method.decoder_depth={choice: [1, 2]}",
    )  # fmt: skip
    done: list[TrialRecord] = []
    for first in (0, 2):
        study = open_study(config, "photos", database)
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
    there = optuna.load_study(study_name="photos", storage=database)
    assert [(t.params, t.value) for t in there.trials] == [(t.params, t.score) for t in done]
    with pytest.raises(RunConflictError, match="another space"):
        open_study(configured(), "photos", database)
