from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from mimray.trainers.engine import metrics
from mimray.trainers.engine.metrics import (
    DAMAGED,
    METRICS,
    MetricsLog,
    read_metrics,
    rewind_metrics,
)
from mimray.trainers.errors import RunConflictError, StorageError
from mimray.trainers.storage import RunDir, claim
from tests.trainers.runs import Remote


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with rows of steps 1 to 5."""
    run = RunDir(str(tmp_path))
    log = MetricsLog(run, 0)
    for step in range(1, 6):
        log.append({"step": step, "loss": 1 / step})
    return run


def steps(run: RunDir) -> list[int]:
    return [row["step"] for row in read_metrics(run)]


def damage(run: RunDir, line: int, by: bytes) -> bytes:
    """Replace a line; returns the file as it is then."""
    lines = run.read(METRICS).split(b"\n")
    lines[line - 1] = by
    run.write(METRICS, b"\n".join(lines))
    return run.read(METRICS)


def test_rewind__drops_what_is_written_again(run: RunDir):
    assert [row["step"] for row in rewind_metrics(run, 3)] == [1, 2, 3]

    MetricsLog(run, 3).append({"step": 4, "loss": 0.5})

    assert steps(run) == [1, 2, 3, 4]
    assert not run.exists(DAMAGED)


def test_read__half_a_last_line_is_dropped_in_silence(
    run: RunDir, caplog: pytest.LogCaptureFixture
):
    run.append(METRICS, b'{"step": 6, "lo')

    assert steps(run) == [1, 2, 3, 4, 5]
    assert not caplog.records


@pytest.mark.parametrize(
    "line", [b"\xff\xfe", b'{"step": 3, "loss": 0.3', b"[]", b'{"loss": 1}', b'{"step": "3"}']
)
def test_read__a_damaged_line_costs_itself_alone(
    run: RunDir, caplog: pytest.LogCaptureFixture, line: bytes
):
    damage(run, 3, line)

    with caplog.at_level(logging.WARNING):
        assert steps(run) == [1, 2, 4, 5]

    assert f"{METRICS}: cannot be read and left out: line 3" in caplog.text


def test_rewind__keeps_what_could_not_be_read(run: RunDir):
    as_found = damage(run, 2, b"\x00")

    rewind_metrics(run, 4)

    assert steps(run) == [1, 3, 4]
    assert run.read(DAMAGED) == as_found
    assert [json.loads(line)["step"] for line in run.read(METRICS).splitlines()] == [1, 3, 4]


class Counted(Remote):
    """A store that counts what is written to it, and refuses it for a while."""

    writes = 0
    refuses = False

    def write(self, name: str, data: bytes) -> None:
        if self.refuses:
            raise StorageError("no such bucket")
        self.writes += 1
        super().write(name, data)


def test_store__rows_are_written_now_and_then_and_all_at_a_flush(tmp_path: Path):
    run = Counted(str(tmp_path))
    log = MetricsLog(run, 0)
    before = run.writes

    for step in range(1, 1001):
        log.append({"step": step})
    log.flush()

    assert steps(run) == list(range(1, 1001))
    assert run.writes - before == 2  # the first row at once, the others at the flush
    log.flush()
    assert run.writes - before == 2


def test_store__rows_follow_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics, "_LEAST_BETWEEN_S", 0.0)
    monkeypatch.setattr(metrics, "_SHARE_OF_TIME", 1e9)
    run = Counted(str(tmp_path))
    log = MetricsLog(run, 0)
    for step in (1, 2, 3):
        log.append({"step": step})
        assert log._writer is not None
        log._writer.join()
        assert steps(run)[-1] == step


def test_store__an_error_behind_is_raised_in_front(tmp_path: Path):
    run = Counted(str(tmp_path))
    log = MetricsLog(run, 0)
    run.refuses = True

    log.append({"step": 1})

    with pytest.raises(StorageError, match="no such bucket"):
        log.flush()
    with pytest.raises(StorageError, match="no such bucket"):
        log.append({"step": 2})


def test_store__a_later_launch_takes_the_run_over(tmp_path: Path):
    run = Counted(str(tmp_path))
    claim(run, "first")
    log = MetricsLog(run, 0, launch_id="first")
    log.append({"step": 1})
    log.flush()
    claim(run, "second")

    log.append({"step": 2})

    with pytest.raises(RunConflictError):
        log.flush()
    assert steps(run) == [1]
