"""The record of a sweep as plain data: read by the report, the table and a later launch.

A sweep is a directory `<storage>/<name>/`: `sweep.json` holds the search, `trials/<number>/` is a
run like any other, with `trial.json` beside its plan.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from pydantic import Field

from mimray.trainers.config.base import Config
from mimray.trainers.engine.metrics import read_metrics
from mimray.trainers.errors import StorageError
from mimray.trainers.evaluation.uncertainty import Figure
from mimray.trainers.storage import RunDir

SWEEP = "sweep.json"
TRIALS = "trials"
TRIAL = "trial.json"
_REPEAT = 1_000_000  # numbers from here on are repeats, so that a search may grow below

# A `stopped` trial was ended by the scheduler for good; a `cut` one, ended by a budget or with the
# driver, may go on.
State = Literal["waiting", "running", "stopped", "finished", "failed", "cut"]
ENDED: tuple[State, ...] = ("stopped", "finished", "failed")


class Rung(Config):
    """One scoring of a trial's encoder, part way or at its end.

    Attributes:
        number: the rung's number from 0, at the same length of training in every trial.
        step: updates made.
        samples: pictures seen, `step` x global batch.
        score: the headline of the sweep's task; larger is better.
        metrics: every figure of the task.
        train_s: seconds of training since the rung before, on the trial's devices.
        score_s: seconds of scoring.
        passed: True if the scheduler let the trial go on.
        budget: pictures that the base recipe sees for the same cost, where trials are compared at
            equal FLOPs; None where they are compared at equal pictures.
        standard_error: the score's standard error over pictures; None where it is not known.
        num_pictures: pictures scored on; None in records of earlier versions.
        evidence: the score by picture, as JSON; None likewise.
    """

    number: int
    step: int
    samples: int
    score: float
    metrics: dict[str, Any] = Field(default_factory=dict)
    train_s: float
    score_s: float
    passed: bool = False
    budget: int | None = None
    standard_error: float | None = None
    num_pictures: int | None = None
    evidence: dict[str, Any] | None = None

    @property
    def place(self) -> int:
        """The rung's place on the axis at which trials are compared."""
        return self.samples if self.budget is None else self.budget

    @property
    def figure(self) -> Figure:
        """The score with its uncertainty."""
        return Figure(self.score, self.standard_error, self.evidence)


class FinalScore(Config):
    """The score of a sweep's winner on pictures that took no part in its choice.

    Attributes:
        trial: the winner's number.
        rungs: the scorings that the winner had, by which a later launch knows its weights.
        headline: the score; larger is better.
        standard_error: the score's standard error over pictures; None where it is not known.
        num_val: pictures scored on.
        place: the pictures scored on, for people.
    """

    trial: int
    rungs: int
    headline: float
    standard_error: float | None
    num_val: int
    place: str


class TrialRecord(Config):
    """One trial: its values, its state, its scores.

    Attributes:
        number: the trial's number from 0, in the order of suggestion.
        params: recipe keys and the values tried.
        state: the trial's state.
        devices: devices held: GPUs, or CPUs where there is no GPU.
        rungs: scorings so far, in order.
        samples: pictures seen so far; what was trained again after a failure counts once.
        loss: the newest training loss; not comparable between mask ratios.
        failures: processes or nodes lost on the way.
        reason: the reason of a failure or a stop, for people.
    """

    number: int
    params: dict[str, Any]
    state: State = "waiting"
    devices: float = 1.0
    rungs: tuple[Rung, ...] = ()
    samples: int = 0
    loss: float | None = None
    failures: int = 0
    reason: str = ""

    @property
    def name(self) -> str:
        """The name of the trial's directory below `trials/`."""
        return trial_name(self.number)

    @property
    def repeats(self) -> int | None:
        """The number of the trial that this one repeats with another seed; None for others."""
        return self.number % _REPEAT if self.number >= _REPEAT else None

    @property
    def score(self) -> float | None:
        """The score at the last rung; None before the first."""
        return self.rungs[-1].score if self.rungs else None

    @property
    def device_seconds(self) -> float:
        """Seconds of training and scoring times the devices held."""
        return self.devices * sum(rung.train_s + rung.score_s for rung in self.rungs)


class SweepRecord(Config):
    """A sweep at any stage.

    Attributes:
        name: the sweep's name.
        uri: the URI of the sweep's directory.
        config: the sweep as the user wrote it, with every default (`config.SweepConfig`).
        keys: the recipe keys searched, in the order of the space.
        metric: the name of a score: `accuracy`, `mIoU` or `RankMe`.
        proxy: the reason why a score is only a proxy, where no labels were given; else empty.
        rung_samples: pictures seen at each rung.
        data: the URI of the pictures trained on.
        data_fingerprint: the fingerprint of the pictures trained on.
        score_data: the URI of the pictures scored on.
        seed: the seed of the search and of every trial.
        command: the command line.
        plan_format: the format of its trials' plans (`trainers.config.run.Plan`).
        study: the name and the storage of Optuna's study.
        planned: trials in the whole sweep, where that is known beforehand.
        elapsed_s: wall time of all launches together.
        ended: True if nothing is left to do.
        trials: the trials, by number; repeats with other seeds come last.
        final: the score of the winner at the end of a launch on pictures kept from the choice; it
            is the present winner's where it is `reported`.
    """

    name: str
    uri: str
    config: dict[str, Any]
    keys: tuple[str, ...]
    metric: str
    proxy: str = ""
    rung_samples: tuple[int, ...]
    data: str
    data_fingerprint: str
    score_data: str
    seed: int
    command: str
    plan_format: int = 1
    study: tuple[str, str] = ("", "")
    planned: int | None = None
    elapsed_s: float = 0.0
    ended: bool = False
    trials: tuple[TrialRecord, ...] = ()
    final: FinalScore | None = None

    def found(self) -> list[TrialRecord]:
        """Trials of the search with a score, the farthest first, among these the best first.

        Scores after different lengths of training are not compared.
        """
        scored = [
            t
            for t in self.trials
            if t.rungs
            and t.state != "failed"
            and t.repeats is None
            # Scores that are not finite have no order.
            and math.isfinite(t.rungs[-1].score)
        ]
        return sorted(scored, key=lambda t: (-len(t.rungs), -t.rungs[-1].score, t.number))

    def ranked(self) -> list[TrialRecord]:
        """Trials of the search in the order of `found`; first those that were repeated.

        Those are ordered by the mean of the other seeds, which is not the maximum of anything.
        """
        means = {t.number: mean(s) for t in self.found() if (s := self.repeated(t.number))}
        return sorted(
            self.found(), key=lambda t: (t.number not in means, -means.get(t.number, 0.0))
        )

    def chosen_by(self, trial: TrialRecord) -> dict[str, Any]:
        """The figure that `ranked` orders a trial by, as `described` takes one.

        It is the mean of its other seeds, where it was repeated, else its last score.
        """
        last, again = trial.rungs[-1], self.repeated(trial.number)
        if again:
            figure = {"headline": mean(again), "standard_error": None, "num_seeds": len(again)}
        else:
            figure = {"headline": last.score, "standard_error": last.standard_error}
        return {**figure, "num_val": last.num_pictures}

    def repeated(self, number: int) -> list[float]:
        """The scores of a trial at its end with other seeds, by seed."""
        again = [t for t in self.trials if t.repeats == number and t.state == "finished"]
        return [t.rungs[-1].score for t in again if t.rungs]

    @property
    def best(self) -> TrialRecord | None:
        """The trial ranked first."""
        return next(iter(self.ranked()), None)

    @property
    def reported(self) -> FinalScore | None:
        """The score of the present winner; None where another trial, or less of it, was scored.

        A larger budget or repeats may find another winner than the one that was scored.
        """
        best, final = self.best, self.final
        if best is None or final is None:
            return None
        return final if (final.trial, final.rungs) == (best.number, len(best.rungs)) else None


def trial_dir(sweep: RunDir, number: int) -> RunDir:
    """The directory of a trial; a run's directory."""
    return sweep / f"{TRIALS}/{trial_name(number)}"


def trial_name(number: int) -> str:
    """The name of a trial's directory: `0007`, or `0007-seed2` for its second repeat."""
    repeat, first = divmod(number, _REPEAT)
    return f"{first:04d}-seed{repeat}" if repeat else f"{first:04d}"


def repeat_number(number: int, seed: int) -> int:
    """The number of a trial's repeat.

    Args:
        number: the number of the trial repeated.
        seed: which of the other seeds, from 1.
    """
    assert number < _REPEAT
    return seed * _REPEAT + number


def read_trials(sweep: RunDir) -> list[TrialRecord]:
    """All trials of a sweep, by number."""
    found = []
    for name in (sweep / TRIALS).folders():
        place = sweep / f"{TRIALS}/{name}"
        if place.exists(TRIAL):
            found.append(TrialRecord.model_validate_json(place.read(TRIAL)))
    return sorted(found, key=lambda trial: trial.number)


def read_record(sweep: RunDir) -> SweepRecord:
    """Read a sweep from its directory.

    Raises:
        StorageError: there is no sweep.
    """
    if not sweep.exists(SWEEP):
        raise StorageError(f"{sweep} is not a sweep", hint="a directory that `mimray tune` made")
    tree = json.loads(sweep.read(SWEEP))
    return SweepRecord.model_validate({**tree, "trials": read_trials(sweep)})


def find_sweep(name: str, storage: str) -> SweepRecord:
    """A sweep by its name in a storage, or by its directory.

    Raises:
        StorageError: there is no such sweep; the message names the places searched.
    """
    places = [RunDir(storage) / name] if "://" not in name and not name.startswith("/") else []
    for place in (*places, RunDir(name)):
        if place.exists(SWEEP):
            return read_record(place)
    raise StorageError(
        f"no sweep {name!r}, neither in {storage} nor as a directory",
        hint="`mimray tune` makes one",
    )


def find_trial(reference: str, storage: str) -> tuple[SweepRecord, TrialRecord] | None:
    """The trial that `SWEEP:best` or `SWEEP:7` names; None where the text is no such reference.

    Raises:
        StorageError: the sweep has no such trial, or none with a score.
    """
    name, colon, which = reference.rpartition(":")
    if not colon or not name or not (which == "best" or which.isdigit()):
        return None
    record = find_sweep(name, storage)
    if which == "best":
        if record.best is None:
            raise StorageError(f"no trial of {record.name} has a score yet")
        return record, record.best
    for trial in record.trials:
        if trial.number == int(which):
            return record, trial
    searched = [trial.number for trial in record.trials if trial.repeats is None]
    there = f"0 to {max(searched)}" if searched else "it has none yet"
    raise StorageError(f"{record.name} has no trial {which}", hint=there)


def trial_place(reference: str, storage: str) -> str:
    """The run of the trial that `SWEEP:best` or `SWEEP:7` names; any other text as it is.

    Raises:
        StorageError: there is no such sweep or trial, or none with a score.
    """
    if Path(reference).expanduser().exists() or "://" in reference:
        return reference
    found = find_trial(reference, storage)
    if found is None:
        return reference
    sweep, trial = found
    return trial_dir(RunDir(sweep.uri), trial.number).uri


def curves(sweep: RunDir, number: int) -> list[dict[str, Any]]:
    """The rows of a trial's `metrics.jsonl`: step, samples, loss and more."""
    return read_metrics(trial_dir(sweep, number))
