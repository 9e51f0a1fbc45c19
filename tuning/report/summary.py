"""The content of a report, computed once; page, text and JSON lay it out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import mean, stdev
from typing import Any

from mimray.trainers.config.base import Config
from mimray.trainers.evaluation.uncertainty import difference
from mimray.tuning.record import SweepRecord, TrialRecord
from mimray.tuning.report.importance import Importance, importance_of
from mimray.tuning.report.speed import SpeedRow, speed_rows
from mimray.tuning.report.values import distinct, frozen, is_number, without_passwords

MASK_RATIO, DECODER_DEPTH = "method.mask_ratio", "method.decoder_depth"
MAX_SIDE = 30
STATES = ("finished", "stopped", "running", "waiting", "cut", "failed")


class Point(Config):
    """A score and its cost.

    Attributes:
        trial: the trial's number.
        rung: the rung's number, from 0.
        samples: pictures seen by then.
        device_seconds: device-seconds of training and scoring by then.
        score: the score; larger is better.
        standard_error: the score's standard error; None where it is not known.
    """

    trial: int
    rung: int
    samples: float
    device_seconds: float
    score: float
    standard_error: float | None = None


class Cell(Config):
    """A square of the heatmap.

    Attributes:
        trial: the number of the best of the trials that came farthest here.
        score: the score at the trial's last rung.
        rungs: rungs that the trial reached.
        standard_error: the score's standard error; None where it is not known.
    """

    trial: int
    score: float
    rungs: int
    standard_error: float | None = None


class Against(Config):
    """A trial's score held against that of the trial ranked first, at the same rung.

    Attributes:
        value: the trial's score less the first one's.
        standard_error: the difference's standard error; None where it is not known.
        paired: True if both were compared picture by picture.
        told_apart: True if chance over pictures alone explains it in fewer than 5 % of cases.
        interval: the bounds of the difference's 95 % interval; None where it is not known.
    """

    value: float
    standard_error: float | None
    paired: bool
    told_apart: bool | None
    interval: tuple[float, float] | None = None


class Seeds(Config):
    """The scores of a trial's repeats with other seeds.

    Attributes:
        scores: the score at the end, by seed.
        mean: their mean.
        deviation: their standard deviation; None of a single one.
    """

    scores: tuple[float, ...]
    mean: float
    deviation: float | None


class Heatmap(Config):
    """Scores over two keys.

    Attributes:
        keys: the keys across and down.
        columns: values of the first key.
        rows: values of the second key.
        cells: squares by row and column; None where no trial has a score.
        rungs: rungs of a whole trial.
    """

    keys: tuple[str, str]
    columns: tuple[Any, ...]
    rows: tuple[Any, ...]
    cells: tuple[tuple[Cell | None, ...], ...]
    rungs: int


class SweepSummary(Config):
    """The content of a sweep's report.

    Attributes:
        record: the sweep's record, without passwords and without repeats, and without the score of
            an earlier winner.
        ranked: trials with a finite score, the best first.
        chosen_by: the figure that the best was chosen by, as `described` takes one.
        rungs: rungs of a whole trial.
        states: the number of trials in each state.
        points: one point for each rung of each ranked trial.
        fronts: the Pareto front of score and cost, by the name of the cost.
        heatmap: scores over two keys; None where no two keys have few enough values.
        importance: the importance of the keys.
        speed: the encoder's speed by mask ratio; empty where that is not searched.
        against: scores less that of the trial ranked first, by number, of those at its rung.
        seeds: the scores of repeats with other seeds, by the number of the trial repeated.
        survived: losses of processes or nodes after which a trial went on.
    """

    record: SweepRecord
    ranked: tuple[TrialRecord, ...]
    chosen_by: dict[str, Any] | None
    rungs: int
    states: dict[str, int]
    points: tuple[Point, ...]
    fronts: dict[str, tuple[Point, ...]]
    heatmap: Heatmap | None
    importance: Importance
    speed: tuple[SpeedRow, ...]
    against: dict[int, Against]
    seeds: dict[int, Seeds]
    survived: int

    @property
    def best(self) -> TrialRecord | None:
        """The trial ranked first."""
        return next(iter(self.ranked), None)

    @property
    def tied(self) -> tuple[TrialRecord, ...]:
        """Trials whose scores are not told apart from the first one's."""
        return tuple(t for t in self.ranked if self._tied(t.number))

    def _tied(self, number: int) -> bool:
        return number in self.against and self.against[number].told_apart is False

    @property
    def failed(self) -> tuple[TrialRecord, ...]:
        """Trials that failed for good."""
        return tuple(t for t in self.record.trials if t.state == "failed")

    def trial(self, number: int) -> TrialRecord:
        """The trial with a number, which must exist."""
        return next(t for t in self.record.trials if t.number == number)


def summarise(record: SweepRecord, speed: Mapping[float, float] | None = None) -> SweepSummary:
    """Compute the content of a report.

    Args:
        record: the record of a sweep at any stage.
        speed: the measured speed over the full sequence by mask ratio.
    """
    whole = SweepRecord.model_validate(without_passwords(record.model_dump()))
    ranked = whole.ranked()
    seeds = {t.number: _seeds(found) for t in ranked if (found := whole.repeated(t.number))}
    searched = tuple(t for t in whole.trials if t.repeats is None)
    record = whole.model_copy(update={"trials": searched, "final": whole.reported})
    points = points_of(ranked)
    reached = max((rungs_of(trial) for trial in record.trials), default=0)
    rungs = len(record.rung_samples) or reached
    ratios = [v for v in values_of(record, MASK_RATIO) if is_number(v)]
    return SweepSummary(
        record=record,
        ranked=tuple(ranked),
        chosen_by=whole.chosen_by(ranked[0]) if ranked else None,
        rungs=rungs,
        states={s: n for s in STATES if (n := sum(t.state == s for t in record.trials))},
        points=tuple(points),
        fronts={cost: tuple(front(points, cost)) for cost in ("samples", "device_seconds")},
        heatmap=heatmap_of(record, ranked, rungs),
        importance=importance_of(record),
        speed=tuple(speed_rows(ratios, speed or {})) if MASK_RATIO in record.keys else (),
        against=against_first(ranked),
        seeds=seeds,
        survived=sum(t.failures for t in whole.trials if t.state != "failed"),
    )


def against_first(ranked: Sequence[TrialRecord]) -> dict[int, Against]:
    """Hold each trial against the first, where both have a score at the same rung.

    Args:
        ranked: trials with scores, the best first.
    """
    found = {}
    for trial in ranked[1:]:
        if rungs_of(trial) == rungs_of(ranked[0]):
            less = difference(trial.rungs[-1].figure, ranked[0].rungs[-1].figure)
            found[trial.number] = Against.model_validate(asdict(less))
    return found


def _seeds(scores: Sequence[float]) -> Seeds:
    deviation = stdev(scores) if len(scores) > 1 else None
    return Seeds(scores=tuple(scores), mean=mean(scores), deviation=deviation)


def rungs_of(trial: TrialRecord) -> int:
    """The number of rungs that a trial has reached."""
    return trial.rungs[-1].number + 1 if trial.rungs else 0


def points_of(ranked: Sequence[TrialRecord]) -> list[Point]:
    """Each rung of each trial with its cost until then.

    Args:
        ranked: trials with scores.
    """
    points = []
    for trial in ranked:
        spent = 0.0
        for rung in trial.rungs:
            spent += trial.devices * (rung.train_s + rung.score_s)
            if math.isfinite(rung.score) and math.isfinite(spent):
                points.append(
                    Point(
                        trial=trial.number,
                        rung=rung.number,
                        samples=rung.samples,
                        device_seconds=spent,
                        score=rung.score,
                        standard_error=rung.standard_error,
                    )
                )
    return points


def front(points: Sequence[Point], cost: str) -> list[Point]:
    """The Pareto front of score and cost: the points that no other dominates.

    Args:
        points: scores and costs, in any order.
        cost: `samples` or `device_seconds`.

    Returns:
        The front, cheapest first.
    """
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (getattr(p, cost), -p.score)):
        equal = kept and (getattr(kept[-1], cost), kept[-1].score) == (
            getattr(point, cost),
            point.score,
        )
        if not kept or point.score > kept[-1].score or equal:
            kept.append(point)
    return kept


def domain_of(record: SweepRecord, key: str) -> Mapping[str, Any]:
    """The domain of a key, such as `{"grid": […]}`; empty where the space has none.

    Args:
        record: the record of a sweep at any stage.
        key: a searched recipe key.
    """
    space = record.config.get("space")
    domain = space.get(key) if isinstance(space, Mapping) else None
    return domain if isinstance(domain, Mapping) else {}


def is_logarithmic(record: SweepRecord, key: str, values: Sequence[Any]) -> bool:
    """True if a key's numbers are spread over orders of magnitude.

    Args:
        record: the record of a sweep at any stage.
        key: a searched recipe key.
        values: the numbers that were tried.
    """
    return "loguniform" in domain_of(record, key) and min(values, default=0) > 0


def values_of(record: SweepRecord, key: str) -> list[Any]:
    """The distinct values of a key: those that the space lists, and those tried.

    Args:
        record: the record of a sweep at any stage.
        key: a searched recipe key.
    """
    domain = domain_of(record, key)
    listed = domain.get("grid") or domain.get("choice") or ()
    tried = [t.params[key] for t in record.trials if key in t.params]
    return distinct([frozen(value) for value in (*listed, *tried)])


def heatmap_keys(record: SweepRecord) -> tuple[str, str] | None:
    """Mask ratio and decoder depth, or the first two keys with at most `MAX_SIDE` values."""
    few = [key for key in record.keys if 0 < len(values_of(record, key)) <= MAX_SIDE]
    if MASK_RATIO in few and DECODER_DEPTH in few:
        return MASK_RATIO, DECODER_DEPTH
    return (few[0], few[1]) if len(few) >= 2 else None


def heatmap_of(record: SweepRecord, ranked: Sequence[TrialRecord], rungs: int) -> Heatmap | None:
    """Scores over two keys; trials that share a square are shown by the one ranked first.

    Args:
        record: the record of a sweep at any stage.
        ranked: the sweep's trials with scores, the best first.
        rungs: rungs of a whole trial.
    """
    keys = heatmap_keys(record)
    if keys is None:
        return None
    found: dict[tuple[Any, Any], Cell] = {}
    for trial in ranked:
        place = frozen(trial.params.get(keys[0])), frozen(trial.params.get(keys[1]))
        last = trial.rungs[-1]
        cell = Cell(
            trial=trial.number,
            score=last.score,
            rungs=rungs_of(trial),
            standard_error=last.standard_error,
        )
        found.setdefault(place, cell)
    columns, rows = (tuple(values_of(record, key)) for key in keys)
    return Heatmap(
        keys=keys,
        columns=columns,
        rows=rows,
        cells=tuple(tuple(found.get((column, row)) for column in columns) for row in rows),
        rungs=rungs,
    )
