from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from mimray.trainers.engine.metrics import (
    DAMAGED,
    METRICS,
    append_metrics,
    read_metrics,
    rewind_metrics,
)
from mimray.trainers.storage import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with rows of steps 1 to 5."""
    run = RunDir(str(tmp_path))
    for step in range(1, 6):
        append_metrics(run, {"step": step, "loss": 1 / step})
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

    append_metrics(run, {"step": 4, "loss": 0.5})

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

    assert f"{METRICS}: line 3 cannot be read" in caplog.text


def test_rewind__keeps_what_could_not_be_read(run: RunDir):
    as_found = damage(run, 2, b"\x00")

    rewind_metrics(run, 4)

    assert steps(run) == [1, 3, 4]
    assert run.read(DAMAGED) == as_found
    assert [json.loads(line)["step"] for line in run.read(METRICS).splitlines()] == [1, 3, 4]
