"""`metrics.jsonl`: one line every few steps, durable, never two lines for one step."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from mimray.trainers.storage import RunDir

METRICS = "metrics.jsonl"
PROBE = "probe_"
"""The prefix of a running probe's figures in rows of metrics."""
PROBE_SECONDS = f"{PROBE}seconds"
STANDARD_ERROR = "_standard_error"
"""The ending of the key of a figure's standard error, beside the figure's own."""


def read_metrics(run: RunDir) -> list[dict[str, Any]]:
    """All rows of a run; a half-written last line, which a crash may leave, is dropped."""
    if not run.exists(METRICS):
        return []
    rows = []
    for line in run.read(METRICS).decode("utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def rewind_metrics(run: RunDir, step: int) -> list[dict[str, Any]]:
    """Drop rows after a step, which a continued run writes again; returns the rest."""
    rows = [row for row in read_metrics(run) if row["step"] <= step]
    run.write(METRICS, _lines(rows))
    return rows


def append_metrics(run: RunDir, row: dict[str, Any]) -> None:
    """Append a row."""
    run.append(METRICS, _lines([row]))


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
