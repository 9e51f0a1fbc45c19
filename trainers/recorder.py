"""The actor beside the driver that records a run's metrics, pictures, warnings and error.

Workers may be on any node; MLflow's SQLite file and the terminal are on the driver's. Rank 0 sends
rows and pictures here without waiting.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from mimray.trainers.config.run import Plan
from mimray.trainers.engine.metrics import ProbeCurve, probe_curve, read_metrics
from mimray.trainers.errors import MimrayError, RunConflictError, StoppedError, StorageError
from mimray.trainers.lifeline import Heartbeat, Roster
from mimray.trainers.pictures import panel_sheet, png
from mimray.trainers.redaction import masked
from mimray.trainers.storage import RunDir, check_owner
from mimray.trainers.tracking import Tracker, track
from mimray.trainers.types import Notice, Panel

RECONSTRUCTION = "reconstruction.png"
HANG_LOG = "hang.log"
LAUNCH = "launch.json"
NAMESPACE = "mimray"
"""Ray's namespace of the recorders, each of which has its launch's id for a name."""

Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class Launch:
    """The newest launch of a run, as `launch.json` keeps it for one who asks how the run stands.

    Attributes:
        launch_id: identifier of the launch, the name of its recorder's actor.
        host: name of the driver's machine.
        address: the Ray cluster's own address, host:port.
        command: the command line.
        began: when it began, seconds since 1970.
        status: its end in MLflow's terms; empty while it is under way, or where it was killed.
        reason: the error that ended it.
        cure: that error's hint.
    """

    launch_id: str
    host: str
    address: str
    command: str
    began: float
    status: Status | Literal[""] = ""
    reason: str = ""
    cure: str = ""


def read_launch(run: RunDir) -> Launch | None:
    """The newest launch of a run; None where nothing readable tells of it."""
    if not run.exists(LAUNCH):
        return None
    try:
        return Launch(**json.loads(run.read(LAUNCH)))
    except (ValueError, TypeError):
        return None


@dataclass
class RunState:
    """The state of a run, for a progress bar.

    Attributes:
        started_at: the step training began at; None before the workers are up.
        attempts: the number of times that workers began to train.
        workers: the number of workers that began the last time.
        row: the newest row of metrics.
        notes: warnings since the last call of `RunRecorder.state`, oldest first.
        error: the error that ended the run for good.
        tracking: the MLflow tracking URI in use, without a password.
        probe: the scores of the running probe; None while there are none.
        phase: the work under way between two updates, such as a score; empty while it trains.
        stopping: the signal for which the workers are asked to stop; empty for none.
    """

    started_at: int | None = None
    attempts: int = 0
    workers: int = 0
    row: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    error: MimrayError | None = None
    tracking: str = ""
    probe: ProbeCurve | None = None
    phase: str = ""
    stopping: str = ""


@dataclass(frozen=True)
class Standing:
    """The state of a run at a moment, for one who asks from outside.

    Attributes:
        state: the run's state; its notes are left to the driver.
        workers: the last heartbeat of each worker, by rank, and seconds since it was heard.
        hung: the reason why a worker counts as hung; empty if none does.
    """

    state: RunState
    workers: list[tuple[Heartbeat, float]]
    hung: str


class RunRecorder:
    """Keeps a run's state, writes MLflow and the pictures; made into a Ray actor by `launch`.

    Args:
        run_uri: the URI of the run's directory.
        storage: the directory or URI of all runs.
        plan: the plan as JSON.
        launch: the launch, for the record.
        fresh: start a new MLflow run instead of going on with an earlier one.
        tracking: the driver's MLflow tracking URI, which nodes need not have in their environment;
            None for their own choice (see `tracking_uri`).
    """

    def __init__(
        self,
        *,
        run_uri: str,
        storage: str,
        plan: str,
        launch: Launch,
        fresh: bool,
        tracking: str | None = None,
    ) -> None:
        self._run = RunDir(run_uri)
        self._plan = Plan.model_validate_json(plan)
        self._launch = launch
        self._state = RunState()
        self._scored: list[dict[str, Any]] = []
        self._roster = Roster(self._plan.recipe.resources.hang_timeout_s)
        self._drained: set[str] = set()
        self._resizing = False
        self._storage, self._fresh = storage, fresh
        self._tracking_uri = tracking
        self._tracker: Tracker | None = None
        # A server that is away holds up this thread, and no heartbeat or signal.
        self._tracking = ThreadPoolExecutor(1, thread_name_prefix="mlflow")

    def open(self) -> None:
        """Open the MLflow run, and tell of the launch; called once, before anything else.

        Workers start meanwhile. Where MLflow cannot be reached or refuses, that is the error that
        ends the run.
        """
        try:
            self._tracker = track(
                self._run,
                self._plan,
                storage=self._storage,
                command=self._launch.command,
                uri=self._tracking_uri,
                resume=not self._fresh,
            )
        except MimrayError as error:
            self.fail(error)
            return
        self._state.tracking = masked(self._tracker.uri)
        self._write_launch()

    def ready(self) -> bool:
        """True, once all earlier calls are done."""
        return True

    def resumed(self, step: int, workers: int) -> None:
        """Record the step at which workers begin, and their number."""
        self._state.started_at, self._state.workers = step, workers
        self._state.attempts += 1
        self._resizing = False
        self._roster.forget()
        # Rows after the step are of an earlier start, and are written again.
        self._scored = [row for row in read_metrics(self._run) if row["step"] <= step]
        self._state.probe = probe_curve(self._scored)
        if self._state.attempts == 1:  # MLflow may be another, or have missed what came last
            rows = self._scored
            self._track(lambda tracker: tracker.rows(rows))

    def metrics(self, row: dict[str, Any]) -> None:
        """Record a row of metrics."""
        self._state.row = row
        self._state.phase = ""
        if probe_curve([row]) is not None:
            earlier = [other for other in self._scored if other["step"] < row["step"]]
            self._scored = [*earlier, row]
            self._state.probe = probe_curve(self._scored)
        values = {k: v for k, v in row.items() if k not in ("step", "time")}
        self._track(lambda tracker: tracker.log(row["step"], values))

    def scoring(self, phase: str, done: int, total: int) -> None:
        """Record how far a score is that the training waits for."""
        self._state.phase = f"{phase} {done}/{total}"

    def pictures(self, step: int, panels: list[Panel]) -> None:
        """Draw panels side by side and keep the sheet."""
        sheet = png(panel_sheet(panels))
        self._keep(RECONSTRUCTION, lambda: self._run.write(RECONSTRUCTION, sheet))
        self._track(lambda tracker: tracker.picture("reconstruction", sheet, step))

    def note(self, message: str) -> None:
        """Keep a worker's warning."""
        self._state.notes.append(message)

    def fail(self, error: MimrayError) -> None:
        """Keep the error that ends the run; the first one counts."""
        self._state.error = self._state.error or error

    def failed(self) -> bool:
        """True if an error has ended the run for good, or MLflow's run could not be opened."""
        return self._state.error is not None or self._tracker is None

    def stop(self, signal: str) -> bool:
        """Ask the workers to stop for a signal; False if none has begun to train."""
        self._state.stopping = signal
        return self._state.started_at is not None

    def beat(self, beat: Heartbeat, actor: Any) -> tuple[Notice, bool]:
        """Take a worker's heartbeat.

        Args:
            beat: the heartbeat.
            actor: the worker's handle.

        Returns:
            What it is asked for, and whether it is to send its stacks.
        """
        stacks = self._roster.beat(beat, actor, time.monotonic())
        if self._state.stopping:
            return Notice.STOP, stacks
        save = self._resizing or beat.node_id in self._drained
        return (Notice.SAVE if save else Notice.NONE), stacks

    def save(self) -> bool:
        """Ask all workers for a checkpoint, until others begin; True once it is written."""
        self._resizing = True
        return self._roster.saved(time.monotonic())

    def stack(self, beat: Heartbeat, stacks: str) -> None:
        """Keep the stacks of a worker while another one hangs, or itself."""
        self._log_hang(f"{beat.where}\n{stacks}")

    def leave(self, rank: int) -> None:
        """Take note that a worker is done."""
        self._roster.leave(rank)

    def look_after(self) -> None:
        """Ask which nodes are drained; end all workers if one hangs, with their stacks kept."""
        import ray

        self._drained = draining_nodes()
        before = self._roster.wants_stacks
        actors = self._roster.due(time.monotonic())
        reason = self._roster.wants_stacks
        if reason and not before:
            self._log_hang(f"{time.ctime()}: {reason}\n")
        if actors:
            self.note(f"{before}: all workers are ended; stacks in {self._run / HANG_LOG}")
        for actor in actors:
            ray.kill(actor)

    def _log_hang(self, text: str) -> None:
        self._keep(HANG_LOG, lambda: self._run.append(HANG_LOG, f"{text}\n".encode()))

    def _keep(self, name: str, write: Callable[[], None]) -> None:
        """Write a file for people; where that fails, a note says so and the run goes on."""
        try:
            write()
        except StorageError as error:
            self.note(f"{name} was not written: {error}")

    def state(self) -> RunState:
        """The run's state; each note is handed out once."""
        state = RunState(**vars(self._state))
        self._state.notes = []
        return state

    def standing(self) -> Standing:
        """The run's state and its workers, for one who asks from outside."""
        now_s = time.monotonic()
        return Standing(
            replace(self._state, notes=[]),
            self._roster.standing(now_s),
            self._roster.wants_stacks or self._roster.hung(now_s),
        )

    def close(self, error: MimrayError | None = None) -> None:
        """End the MLflow run, and keep how the launch ended.

        Args:
            error: the error that ended it; None if the run is finished.
        """
        reason, cure = (str(error.args[-1]), error.hint) if error else ("", "")
        self._launch = replace(self._launch, status=_status(error), reason=reason, cure=cure)
        self._write_launch()
        self._track(lambda tracker: tracker.finish(_status(error))).result()

    def _track(self, call: Callable[[Tracker], object]) -> Future[None]:
        """Make a call of the tracker after all earlier ones; an error becomes a note."""

        def told() -> None:
            if self._tracker is None:  # it could not be opened, which is the run's error
                return
            try:
                with warnings_to(self.note, "mimray.trainers.tracking"):
                    call(self._tracker)
            except Exception as error:
                self.note(f"MLflow was not told: {type(error).__name__}: {error}")

        return self._tracking.submit(told)

    def _write_launch(self) -> None:
        def write() -> None:
            check_owner(self._run, self._launch.launch_id)
            self._run.write(LAUNCH, json.dumps(asdict(self._launch), indent=1).encode())

        with suppress(RunConflictError):  # the file is the later launch's
            self._keep(LAUNCH, write)


def _status(error: MimrayError | None) -> Status:
    """The end of a run, in MLflow's terms."""
    if error is None:
        return "FINISHED"
    return "KILLED" if isinstance(error, StoppedError) else "FAILED"


def draining_nodes() -> set[str]:
    """Ray's ids of the nodes that are about to be taken away."""
    # Ray has no public name for it; Ray Train reads the same.
    from ray._private.state import state

    return set(state.get_draining_nodes())


class RunLink:
    """A worker's handle of the run's recorder; an `engine.loop.Observer`.

    Args:
        recorder: the actor's handle.
        workers: the number of workers.
    """

    def __init__(self, recorder: Any, workers: int) -> None:
        import ray

        self._recorder, self._workers = recorder, workers
        self._get = ray.get

    def resumed(self, step: int) -> None:
        """Send the step at which training begins."""
        self._recorder.resumed.remote(step, self._workers)

    def metrics(self, row: dict[str, Any]) -> None:
        """Send a row of `metrics.jsonl`."""
        self._recorder.metrics.remote(row)

    def scoring(self, phase: str, done: int, total: int) -> None:
        """Send how far a score is that the training waits for."""
        self._recorder.scoring.remote(phase, done, total)

    def pictures(self, step: int, panels: list[Panel]) -> None:
        """Send the panels that the method drew at a step."""
        self._recorder.pictures.remote(step, panels)

    def flush(self) -> None:
        """Return when the recorder has taken everything sent so far."""
        self._get(self._recorder.ready.remote())

    def fail(self, error: MimrayError) -> None:
        """Send the error that ends the run; returns when the recorder has it."""
        self._get(self._recorder.fail.remote(error))

    def failed(self) -> bool:
        """True if an error has ended the run for good."""
        return bool(self._get(self._recorder.failed.remote()))

    def warnings(self) -> AbstractContextManager[None]:
        """Send this process's warnings to the driver's terminal for the time being."""
        return warnings_to(self._recorder.note.remote, "mimray.trainers")


@contextmanager
def warnings_to(note: Callable[[str], object], room: str) -> Iterator[None]:
    """Hand the warnings of a package's loggers on for the time being.

    Args:
        note: takes each warning.
        room: the package or module.
    """
    handler = _WarningForwarder(note)
    logger = logging.getLogger(room)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _WarningForwarder(logging.Handler):
    """Forwards each warning once, however often it is repeated."""

    def __init__(self, note: Callable[[str], object]) -> None:
        super().__init__(level=logging.WARNING)
        self._note = note
        self._seen: set[str] = set()
        self._guard = threading.Lock()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        with self._guard:
            if message in self._seen:
                return
            self._seen.add(message)
        self._note(message)
