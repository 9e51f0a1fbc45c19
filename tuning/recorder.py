"""The actor beside the driver that records the trials of a sweep.

Trials may be on any node; `trial.json`, MLflow and TensorBoard are written on the driver's. MLflow
and TensorBoard are fed from a queue, so that no trial waits for them.
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
from mimray.trainers.recorder import RECONSTRUCTION
from mimray.trainers.storage import RunDir
from mimray.trainers.types import Panel
from mimray.tuning.record import (
    ENDED,
    SWEEP,
    TRIAL,
    FinalScore,
    Rung,
    State,
    SweepRecord,
    TrialRecord,
    trial_dir,
)
from mimray.tuning.trackers import SweepTrackers

logger = logging.getLogger(__name__)


class SweepRecorder:
    """Records a sweep; made into a Ray actor by `sweep`.

    Args:
        record: the sweep's record so far, as JSON.
        storage: the directory or URI of all runs and sweeps.
        tracked: write to MLflow and TensorBoard.
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
        """True, once the actor has started."""
        return True

    def begin(self, number: int, params: dict[str, Any], devices: float, plan: str) -> TrialRecord:
        """Record that a trial begins, or goes on in a new process.

        Args:
            number: the trial's number.
            params: recipe keys and the trial's values.
            devices: devices that the trial holds.
            plan: the trial's plan as JSON; empty where it could not be made.

        Returns:
            The trial's record so far.
        """
        trial = self._trials.get(number) or TrialRecord(number=number, params=params)
        self._put(trial.model_copy(update={"state": "running", "devices": devices}))
        if plan:
            parsed = Plan.model_validate_json(plan)
            self._push(lambda trackers: trackers.begin(number, params, parsed))
        return self._trials[number]

    def metrics(self, number: int, row: dict[str, Any]) -> None:
        """Record a row of a trial's metrics."""
        self._rows[number] = row
        self._push(lambda trackers: trackers.metrics(number, row))

    def pictures(self, number: int, step: int, panels: list[Panel]) -> None:
        """Draw a trial's reconstructions and keep the sheet."""
        sheet = png(panel_sheet(panels))
        trial_dir(self._sweep, number).write(RECONSTRUCTION, sheet)
        self._push(lambda trackers: trackers.picture(number, step, sheet))

    def rung(self, number: int, rung: Rung) -> None:
        """Record a scoring; a rung that is recorded already stays as it was."""
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
        """The record of a trial."""
        return self._trials[number]

    def passed(self, number: int) -> None:
        """Record that the scheduler let a trial go on after its newest rung."""
        trial = self._trials[number]
        if trial.rungs:
            last = trial.rungs[-1].model_copy(update={"passed": True})
            self._put(trial.model_copy(update={"rungs": (*trial.rungs[:-1], last)}))

    def lost(self, number: int) -> None:
        """Record the loss of a trial's process or node."""
        trial = self._trials[number]
        self._put(trial.model_copy(update={"failures": trial.failures + 1}))

    def end(self, number: int, state: State, reason: str = "") -> TrialRecord:
        """Record the end of a trial, of which the first one counts; gives the trial's record."""
        trial = self._trials[number]
        if trial.state not in ENDED:
            trial = trial.model_copy(update={"state": state, "reason": reason})
            self._put(trial)
            self._push(lambda trackers: trackers.end(number, trial))
        return trial

    def final(self, score: FinalScore) -> None:
        """Record the winner's score on pictures kept from the choice."""
        self._record = self._record.model_copy(update={"final": score})
        self._keep()

    def note(self, message: str) -> None:
        """Keep a warning for the driver's terminal, once."""
        if message not in self._notes:
            self._notes.append(message)

    def current(self) -> SweepRecord:
        """The sweep's record as it is now."""
        elapsed_s = self._elapsed_before_s + time.monotonic() - self._began
        trials = tuple(self._trials[number] for number in sorted(self._trials))
        return self._record.model_copy(update={"elapsed_s": elapsed_s, "trials": trials})

    def snapshot(self) -> tuple[SweepRecord, dict[int, dict[str, Any]], list[str]]:
        """The record, the newest row of each trial, and the warnings since the last snapshot."""
        notes, self._notes = self._notes, []
        return self.current(), dict(self._rows), notes

    def close(self, ended: bool, status: Literal["FINISHED", "KILLED"]) -> SweepRecord:
        """End this launch of the sweep; trials that still run are cut.

        Args:
            ended: True if nothing of the sweep is left to do.
            status: the status of MLflow's parent run.
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
        """Feed MLflow and TensorBoard, in a thread; a refusal becomes a warning, fails no trial."""
        trackers: SweepTrackers | None = None
        while (message := self._queue.get()) is not None:
            try:
                trackers = trackers or SweepTrackers(self._record, storage)
                message(trackers)
            except MimrayError as error:
                logger.warning("%s", error)
                self.note(str(error))


class TrialLink:
    """A trial's handle of the sweep's recorder; an `engine.loop.Observer`."""

    def __init__(self, recorder: Any, number: int) -> None:
        self._recorder, self._number = recorder, number

    def resumed(self, step: int) -> None:
        """Do nothing: `begin` has recorded the start."""

    def metrics(self, row: dict[str, Any]) -> None:
        """Send a row of `metrics.jsonl`."""
        self._recorder.metrics.remote(self._number, row)

    def pictures(self, step: int, panels: list[Panel]) -> None:
        """Send the panels that the method drew at a step."""
        self._recorder.pictures.remote(self._number, step, panels)
