"""The record of a sweep as plain data: read by the report, the table and a later launch.

A sweep is a directory `<storage>/<name>/`: `sweep.json` holds the search, `trials/<number>/` is a
run like any other, with `trial.json` beside its plan.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field

from mimray.trainers.config.base import Config
from mimray.trainers.engine.metrics import read_metrics
from mimray.trainers.errors import StorageError
from mimray.trainers.storage import RunDir

SWEEP = "sweep.json"
TRIALS = "trials"
TRIAL = "trial.json"

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
    """

    number: int
    step: int
    samples: int
    score: float
    metrics: dict[str, Any] = Field(default_factory=dict)
    train_s: float
    score_s: float
    passed: bool = False


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
        return f"{self.number:04d}"

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
        study: the name and the storage of Optuna's study.
        planned: trials in the whole sweep, where that is known beforehand.
        elapsed_s: wall time of all launches together.
        ended: True if nothing is left to do.
        trials: the trials, by number.
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
    study: tuple[str, str] = ("", "")
    planned: int | None = None
    elapsed_s: float = 0.0
    ended: bool = False
    trials: tuple[TrialRecord, ...] = ()

    def ranked(self) -> list[TrialRecord]:
        """Trials with a score, those that came farthest first, among these the best first.

        Scores after different lengths of training are not compared.
        """
        scored = [t for t in self.trials if t.rungs and t.state != "failed"]
        return sorted(scored, key=lambda t: (-len(t.rungs), -t.rungs[-1].score, t.number))

    @property
    def best(self) -> TrialRecord | None:
        """The trial ranked first."""
        return next(iter(self.ranked()), None)


def trial_dir(sweep: RunDir, number: int) -> RunDir:
    """The directory of a trial; a run's directory."""
    return sweep / f"{TRIALS}/{number:04d}"


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
    raise StorageError(f"{record.name} has no trial {which}", hint=f"0 to {len(record.trials) - 1}")


def curves(sweep: RunDir, number: int) -> list[dict[str, Any]]:
    """The rows of a trial's `metrics.jsonl`: step, samples, loss and more."""
    return read_metrics(trial_dir(sweep, number))
