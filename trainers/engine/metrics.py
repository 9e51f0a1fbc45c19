"""`metrics.jsonl`: one line every few steps, durable, never two lines for one step."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from mimray.trainers.errors import MimrayError
from mimray.trainers.storage import RunDir, check_owner

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
DAMAGED = "metrics.damaged.jsonl"
"""The metrics as they were found, where lines of them could not be read."""
# Rows of a long run are many megabytes, and each time all are written.
_LEAST_BETWEEN_S, _SHARE_OF_TIME = 5.0, 0.05
PROBE = "probe_"
"""The prefix of a running probe's figures in rows of metrics."""
PROBE_SECONDS = f"{PROBE}seconds"
STANDARD_ERROR = "_standard_error"
"""The ending of the key of a figure's standard error, beside the figure's own."""


def read_metrics(run: RunDir) -> list[dict[str, Any]]:
    """All rows of a run that can be read.

    A half-written last line, which a crash may leave, is dropped; any other line that is no row is
    left out with a warning.
    """
    return _read(run)[0]


def rewind_metrics(run: RunDir, step: int) -> list[dict[str, Any]]:
    """Drop rows after a step, which a continued run writes again; returns the rest.

    Where lines cannot be read, the file as it was is kept beside it.
    """
    found, damaged = _read(run)
    if damaged:
        run.write(DAMAGED, run.read(METRICS))
    rows = [row for row in found if row["step"] <= step]
    run.write(METRICS, _lines(rows))
    return rows


def _read(run: RunDir) -> tuple[list[dict[str, Any]], list[int]]:
    """Rows, and the numbers of lines that are none; a last line without an end is no such line."""
    if not run.exists(METRICS):
        return [], []
    rows, damaged = [], []
    lines = run.read(METRICS).split(b"\n")
    for number, line in enumerate(lines, start=1):
        row = _row_in(line)
        if row is not None:
            rows.append(row)
        elif line.strip() and number < len(lines):
            damaged.append(number)
    if damaged:
        numbers = ", ".join(map(str, damaged))
        logger.warning("%s/%s: cannot be read and left out: line %s", run, METRICS, numbers)
    return rows, damaged


def _row_in(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # UnicodeDecodeError, too
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


class MetricsLog:
    """The rows of a run, on rank 0: written at once to a local disk, in the background to a store.

    A store cannot append, so all rows are written again, and a thread does it now and then. Before
    a checkpoint is written they are flushed: what a crash may cost is made again from there.

    Args:
        run: the run's directory.
        step: the step that the run goes on from; later rows are dropped.
        launch_id: identifier of the launch that writes; see `storage.check_owner`.

    Attributes:
        last: the newest row; empty without one.
    """

    def __init__(self, run: RunDir, step: int, launch_id: str = "") -> None:
        rows = rewind_metrics(run, step)
        self.last: dict[str, Any] = rows[-1] if rows else {}
        self._run, self._launch_id = run, launch_id
        self._lines = [_lines([row]) for row in rows]
        self._num_written = len(rows)
        self._next_at_s = 0.0
        self._writer: threading.Thread | None = None
        self._error: MimrayError | None = None

    def append(self, row: dict[str, Any]) -> None:
        """Add a row.

        Raises:
            RunConflictError: a later launch has taken the run over.
            StorageError: this row, or an earlier one, could not be written.
        """
        self.last = row
        if self._run.local is not None:
            check_owner(self._run, self._launch_id)
            self._run.append(METRICS, _lines([row]))
            return
        self._raise()
        self._lines.append(_lines([row]))
        busy = self._writer is not None and self._writer.is_alive()
        if not busy and time.monotonic() >= self._next_at_s:
            self._writer = threading.Thread(target=self._write, name="metrics", daemon=True)
            self._writer.start()

    def flush(self) -> None:
        """Return when every row is written; errors are those of `append`."""
        if self._writer is not None:
            self._writer.join()
        self._raise()
        if self._run.local is None and self._num_written < len(self._lines):
            self._write()
            self._raise()

    def _write(self) -> None:
        began, count = time.monotonic(), len(self._lines)
        try:
            check_owner(self._run, self._launch_id)
            self._run.write(METRICS, b"".join(self._lines[:count]))
            self._num_written = count
        except MimrayError as error:
            self._error = error
        now = time.monotonic()
        self._next_at_s = now + max(_LEAST_BETWEEN_S, (now - began) / _SHARE_OF_TIME)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


class ProbeScore(NamedTuple):
    """A score of a running probe.

    Attributes:
        step: updates made.
        value: the score.
        standard_error: its standard error; None where the task knows none.
    """

    step: int
    value: float
    standard_error: float | None = None


@dataclass(frozen=True)
class ProbeCurve:
    """The scores of a running probe.

    Attributes:
        figure: the figure's name, e.g. `knn_accuracy`; larger is better.
        points: the scores in the order of the updates; one at least.
    """

    figure: str
    points: tuple[ProbeScore, ...]

    @property
    def last(self) -> ProbeScore:
        """The newest score."""
        return self.points[-1]

    @property
    def best(self) -> ProbeScore:
        """The largest score, the first of equal ones."""
        return max(self.points, key=lambda point: point.value)


def probe_curve(rows: Iterable[Mapping[str, Any]]) -> ProbeCurve | None:
    """The scores in rows of metrics: of the newest figure, where the probe was changed."""
    rows = list(rows)
    for row in reversed(rows):
        for key in row:
            if key.startswith(PROBE) and not key.endswith((PROBE_SECONDS, STANDARD_ERROR)):
                points = tuple(
                    ProbeScore(r["step"], r[key], r.get(key + STANDARD_ERROR))
                    for r in rows
                    if key in r
                )
                return ProbeCurve(key.removeprefix(PROBE), points)
    return None


def _lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


class Speed:
    """Pictures a second and the share of time spent waiting for data, since the last row.

    Args:
        pictures_a_step: the global batch size.
    """

    def __init__(self, pictures_a_step: int) -> None:
        self._pictures_a_step = pictures_a_step
        self.restart()

    def restart(self) -> None:
        """Begin a new interval, e.g. after a pause that is no training."""
        self._began = time.perf_counter()
        self._steps = 0
        self._waited_s = 0.0

    def add(self, data_wait_s: float) -> None:
        """Count a step, and the seconds of it spent waiting for data."""
        self._steps += 1
        self._waited_s += data_wait_s

    def take(self) -> tuple[float, float]:
        """Pictures a second and the share of time spent waiting; begins a new interval."""
        elapsed = max(time.perf_counter() - self._began, 1e-9)
        rates = self._steps * self._pictures_a_step / elapsed, self._waited_s / elapsed
        self.restart()
        return rates
