"""The recorder: one actor beside the driver that keeps what trials report.

Trials may be on any node; `trial.json`, MLflow, TensorBoard and the table are written here. What
MLflow and TensorBoard are told waits in a queue, so that no trial waits for them.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

from mimray.trainers.config.run import Plan
from mimray.trainers.errors import MimrayError
from mimray.trainers.pictures import panel_sheet, png
from mimray.trainers.storage import RunDir
from mimray.trainers.types import Panel
from mimray.tuning.record import (
    ENDED,
    SWEEP,
    TRIAL,
    Rung,
    State,
    SweepRecord,
    TrialRecord,
    trial_dir,
)
from mimray.tuning.trackers import SweepTrackers

RECONSTRUCTION = "reconstruction.png"

logger = logging.getLogger(__name__)


class SweepRecorder:
    """Keeps the sweep's record; made into a Ray actor by `sweep`.

    Args:
        record: the sweep so far, as JSON.
        storage: the directory of all runs and sweeps.
        tracked: whether MLflow and TensorBoard are told.
    """

    def __init__(self, *, record: str, storage: str, tracked: bool = True) -> None:
        self._record = SweepRecord.model_validate_json(record)
        self._sweep = RunDir(self._record.uri)
        self._trials = {trial.number: trial for trial in self._record.trials}
        self._rows: dict[int, dict[str, Any]] = {}
        self._began, self._elapsed_before_s = time.monotonic(), self._record.elapsed_s
        self._notes: list[str] = []
        self._queue: queue.SimpleQueue[Callable[[SweepTrackers], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._tell, args=(storage,), daemon=True)
        self._tracked = tracked
        if tracked:
            self._thread.start()
        self._keep()

    def ready(self) -> bool:
        """Answers once the recorder is there."""
        return True

    def begin(self, number: int, params: dict[str, Any], devices: float, plan: str) -> TrialRecord:
        """A trial begins, or goes on in a new process; gives what is known of it.

        Args:
            number: of the trial.
            params: recipe keys and values.
            devices: that it holds.
            plan: of the trial, as JSON; empty where it could not be made.
        """
        trial = self._trials.get(number) or TrialRecord(number=number, params=params)
        self._put(trial.model_copy(update={"state": "running", "devices": devices}))
        if plan:
            parsed = Plan.model_validate_json(plan)
            self._push(lambda trackers: trackers.begin(number, params, parsed))
        return self._trials[number]

    def metrics(self, number: int, row: dict[str, Any]) -> None:
        """Take a row of a trial's metrics."""
        self._rows[number] = row
        self._push(lambda trackers: trackers.metrics(number, row))

    def pictures(self, number: int, step: int, panels: list[Panel]) -> None:
        """Draw a trial's reconstructions and keep the sheet."""
        sheet = png(panel_sheet(panels))
        trial_dir(self._sweep, number).write(RECONSTRUCTION, sheet)
        self._push(lambda trackers: trackers.picture(number, step, sheet))

    def rung(self, number: int, rung: Rung) -> None:
        """A trial was scored; a rung that is known already stays as it was."""
        trial = self._trials[number]
        if any(known.number == rung.number for known in trial.rungs):
            return
        row = self._rows.get(number, {})
        changes = {
            "rungs": (*trial.rungs, rung),
            "samples": max(trial.samples, rung.samples),
            "loss": row.get("loss", trial.loss),
        }
        self._put(trial.model_copy(update=changes))
        self._push(lambda trackers: trackers.score(number, rung))

    def record(self, number: int) -> TrialRecord:
        """What is known of a trial."""
        return self._trials[number]

    def passed(self, number: int) -> None:
        """The scheduler let a trial go on after its newest rung."""
        trial = self._trials[number]
        if trial.rungs:
            last = trial.rungs[-1].model_copy(update={"passed": True})
            self._put(trial.model_copy(update={"rungs": (*trial.rungs[:-1], last)}))

    def lost(self, number: int) -> None:
        """A trial's process or node is gone; another takes over."""
        trial = self._trials[number]
        self._put(trial.model_copy(update={"failures": trial.failures + 1}))

    def end(self, number: int, state: State, reason: str = "") -> TrialRecord:
        """A trial ends; the first end counts. Gives its record."""
        trial = self._trials[number]
        if trial.state not in ENDED:
            trial = trial.model_copy(update={"state": state, "reason": reason})
            self._put(trial)
            self._push(lambda trackers: trackers.end(number, trial))
        return trial

    def note(self, message: str) -> None:
        """Take a warning for the driver's terminal."""
        if message not in self._notes:
            self._notes.append(message)

    def current(self) -> SweepRecord:
        """The record as it is; warnings stay with the recorder."""
        elapsed_s = self._elapsed_before_s + time.monotonic() - self._began
        trials = tuple(self._trials[number] for number in sorted(self._trials))
        return self._record.model_copy(update={"elapsed_s": elapsed_s, "trials": trials})

    def snapshot(self) -> tuple[SweepRecord, dict[int, dict[str, Any]], list[str]]:
        """The record, the newest row of each trial, and warnings, each once: for who shows them."""
        notes, self._notes = self._notes, []
        return self.current(), dict(self._rows), notes

    def close(self, ended: bool, status: Literal["FINISHED", "KILLED"]) -> SweepRecord:
        """End the sweep, or this launch of it; trials that still run are cut.

        Args:
            ended: nothing is left to do.
            status: of MLflow's parent run.
        """
        for number, trial in list(self._trials.items()):
            if trial.state not in ENDED:
                self.end(number, "cut", "the sweep was interrupted; --resume goes on with it")
        self._record = self._record.model_copy(update={"ended": ended})
        self._keep()
        if self._tracked:
            final = self.current()
            self._push(lambda trackers: trackers.close(final, status))
            self._queue.put(None)
            self._thread.join()
        return self.current()

    def _put(self, trial: TrialRecord) -> None:
        self._trials[trial.number] = trial
        place = trial_dir(self._sweep, trial.number)
        place.create()
        place.write(TRIAL, trial.model_dump_json(indent=1).encode() + b"\n")
        self._keep()

    def _keep(self) -> None:
        tree = self.current().model_copy(update={"trials": ()})
        self._sweep.write(SWEEP, tree.model_dump_json(indent=1, exclude={"trials"}).encode())

    def _push(self, message: Callable[[SweepTrackers], None]) -> None:
        if self._tracked:
            self._queue.put(message)

    def _tell(self, storage: str) -> None:
        """The thread that feeds MLflow and TensorBoard; what they refuse costs no trial."""
        trackers: SweepTrackers | None = None
        while (message := self._queue.get()) is not None:
            try:
                trackers = trackers or SweepTrackers(self._record, storage)
                message(trackers)
            except MimrayError as error:
                logger.warning("%s", error)
                self.note(str(error))


class TrialLink:
    """A trial's end of the recorder; an `engine.loop.Observer`."""

    def __init__(self, recorder: Any, number: int) -> None:
        self._recorder, self._number = recorder, number

    def resumed(self, step: int) -> None:
        """Training begins at this step."""

    def metrics(self, row: dict[str, Any]) -> None:
        """A row went into `metrics.jsonl`."""
        self._recorder.metrics.remote(self._number, row)

    def pictures(self, step: int, panels: list[Panel]) -> None:
        """What the method draws at a step."""
        self._recorder.pictures.remote(self._number, step, panels)
