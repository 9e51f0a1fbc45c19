"""A sweep on Ray: Tuner, scheduler, budgets, continuing.

Each launch is a fresh experiment of Tune's. The record lies in the sweep's own directory: the
search continues after the trials there, and the scheduler is told their scores again.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)
from ray.tune.utils.log import Verbosity
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mimray.trainers.cluster import connected
from mimray.trainers.errors import RunConflictError
from mimray.trainers.launch import last_line
from mimray.trainers.storage import RunDir, claim
from mimray.tuning.capacity import count
from mimray.tuning.config import Asha, Median, SweepConfig
from mimray.tuning.plan import SweepPlan, check_continues, new_record
from mimray.tuning.record import ENDED, SWEEP, SweepRecord, TrialRecord, read_record, trial_dir
from mimray.tuning.recorder import SweepRecorder
from mimray.tuning.search import SAMPLES, SCORE, Repeated, Suggestions
from mimray.tuning.space import num_trials
from mimray.tuning.study import open_study, study_errors
from mimray.tuning.trial import FAILED, LaunchContext, Trial
from mimray.tuning.winner import report_winner

logger = logging.getLogger(__name__)

POLL_S = 0.5
OnProgress = Callable[[SweepRecord, dict[int, dict[str, Any]], list[str]], None]


@dataclass(frozen=True)
class Launch:
    """One start of a sweep.

    Attributes:
        plan: the sweep's plan, from `make_plan`.
        storage: the directory or URI of all runs and sweeps.
        concurrent: trials at once; as many as fit by default.
        fresh: delete what an earlier sweep of this name left.
        cache_mib: the bound of the decoded pictures that trials of a node share; 0 for none.
    """

    plan: SweepPlan
    storage: str
    concurrent: int | None = None
    fresh: bool = False
    cache_mib: int = 0


def before(launch: Launch) -> SweepRecord | None:
    """Read what an earlier launch of the same sweep left; None without one, and with `fresh`.

    Needs no cluster and writes nothing.

    Raises:
        RunConflictError: the directory holds another sweep, or something else.
    """
    plan = launch.plan
    directory = plan.directory
    if not directory.exists(SWEEP):
        if directory.exists("plan.json") or (launch.fresh and directory.exists()):
            raise RunConflictError(
                f"{directory} exists and is not a sweep", hint="choose another --name"
            )
        return None
    if launch.fresh:
        return None
    found = read_record(directory)
    check_continues(plan, found)
    return found


@connected()
def run_sweep(launch: Launch, on_progress: OnProgress | None = None) -> SweepRecord:
    """Run a sweep to its end, or as far as its budget goes; continues what is there.

    Args:
        launch: the launch that was asked for.
        on_progress: called about twice a second with the record, the newest row of metrics of each
            trial, and new warnings.

    Returns:
        The record at the end.

    Raises:
        ResourceError: the cluster can never run a trial, or not as many at once as asked for.
        RunConflictError: the directory or the study belongs to another sweep.
        StorageError: Optuna's database or the storage does not answer.
    """
    plan, config = launch.plan, launch.plan.config
    earlier = before(launch)
    planned = num_trials(config)
    capacity = count(config.resources, planned, launch.concurrent)
    directory = plan.directory
    if launch.fresh:
        directory.delete()
    directory.create()
    place = study_place(plan)
    study = open_study(config, *place, fresh=launch.fresh)
    record = earlier or new_record(plan, place)
    record = record.model_copy(
        update={
            "config": config.model_dump(mode="json"),
            "planned": planned,
            "ended": False,
        }
    )
    launch_id = uuid.uuid4().hex
    claim(directory, launch_id)

    recorder = _open_recorder(record, launch)

    def may_start() -> bool:
        """True if the budget of pictures allows another trial."""
        current: SweepRecord = ray.get(recorder.current.remote())
        spent = sum(trial.samples for trial in current.trials if trial.repeats is None)
        return config.budget.samples is None or spent < config.budget.samples

    context = LaunchContext(plan, capacity, recorder, launch_id, launch.cache_mib)
    stage = _Stage(launch, context, record.elapsed_s, time.monotonic)
    with study_errors(place[1]):
        suggestions = Suggestions(config, study, record.trials, may_start, plan.trial)
    search = RecordingScheduler(_scheduler(config, plan.rung_samples), recorder)
    search.replay(trial for trial in record.trials if trial.repeats is None)
    with _Poller(recorder, on_progress):
        with study_errors(place[1]):
            stage.run(suggestions, search)
        current: SweepRecord = ray.get(recorder.current.remote())
        if stage.complete(current):
            repeats = Repeated(config, current)
            if not repeats.exhausted:
                stage.run(repeats, RecordingScheduler(FIFOScheduler(), recorder))
                current = ray.get(recorder.current.remote())
        if stage.complete(current):
            report_winner(context, current)
    done, in_time = all(trial.state in ENDED for trial in current.trials), stage.in_time
    ended = done and in_time and suggestions.exhausted
    final: SweepRecord = ray.get(recorder.close.remote(ended, "FINISHED" if done else "KILLED"))
    if on_progress is not None:
        on_progress(*ray.get(recorder.snapshot.remote()))
    ray.kill(recorder)
    directory.delete(".ray")
    return final


class _Stage:
    """Part of a sweep that Tune runs: the search, and then the repeats of the best.

    Args:
        launch: the launch that was asked for.
        context: the values that all trials share.
        elapsed_before_s: wall time of earlier launches.
        clock: seconds that pass, as `time.monotonic` tells them.
    """

    def __init__(
        self,
        launch: Launch,
        context: LaunchContext,
        elapsed_before_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._launch, self._context = launch, context
        self._clock, self._started_s = clock, clock()
        hours = launch.plan.config.budget.hours
        # At least a second, for a scoring that is left over.
        self._budget_s = None if hours is None else max(1.0, hours * 3600 - elapsed_before_s)

    @property
    def in_time(self) -> bool:
        """True if the budget of hours is not spent."""
        return self._budget_s is None or self._clock() - self._started_s < self._budget_s

    def complete(self, record: SweepRecord) -> bool:
        """True if every trial that was begun has ended, and there is time for what follows."""
        return self.in_time and all(trial.state in ENDED for trial in record.trials)

    def run(self, searcher: Suggestions | Repeated, scheduler: RecordingScheduler) -> None:
        """Run trials until the searcher has no more, or the budget of hours is spent."""
        plan, context = self._launch.plan, self._context
        capacity, directory = context.capacity, plan.directory
        left_s = None
        if self._budget_s is not None:
            left_s = max(1.0, self._budget_s - (self._clock() - self._started_s))
        # A trial that failed has no score to report.
        os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
        # Ray's own callbacks would write every trial a second time.
        os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
        os.environ["TUNE_DISABLE_AUTO_CALLBACK_SYNCER"] = "1"
        os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
        tune.Tuner(
            tune.with_resources(tune.with_parameters(Trial, context=context), capacity.tune),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=-1,
                max_concurrent_trials=capacity.concurrent,
                reuse_actors=True,
                time_budget_s=left_s,
            ),
            # A name of its own for each stage keeps Ray from resuming by its own records.
            run_config=tune.RunConfig(
                name=uuid.uuid4().hex,
                storage_path=(directory / ".ray").uri,
                failure_config=tune.FailureConfig(max_failures=plan.config.resources.max_failures),
                callbacks=[_EndRecorder(directory, context.recorder, searcher, scheduler)],
                verbose=Verbosity.V0_MINIMAL,
            ),
        ).fit()


def study_place(plan: SweepPlan) -> tuple[str, str]:
    """The name and storage of a sweep's study; by default SQLite in the sweep's directory."""
    from pathlib import Path

    name = plan.config.study or plan.name
    if plan.config.storage:
        return name, plan.config.storage
    local = plan.directory.local or Path("runs").absolute() / plan.name
    local.mkdir(parents=True, exist_ok=True)
    return name, f"sqlite:///{local}/study.db"


def _scheduler(config: SweepConfig, rung_samples: tuple[int, ...]) -> TrialScheduler:
    scheduler = config.scheduler
    if isinstance(scheduler, Asha):
        return ASHAScheduler(
            time_attr=SAMPLES,
            metric=SCORE,
            mode="max",
            max_t=rung_samples[-1],
            grace_period=rung_samples[0],
            reduction_factor=scheduler.reduction_factor,
        )
    if isinstance(scheduler, Median):
        return MedianStoppingRule(
            time_attr=SAMPLES,
            metric=SCORE,
            mode="max",
            grace_period=rung_samples[0],
            min_samples_required=scheduler.min_trials,
            min_time_slice=float("inf"),  # never pause a trial in favour of another
        )
    return FIFOScheduler()


@dataclass(frozen=True)
class _Remembered:
    """A stand-in for a trial of an earlier launch; a scheduler reads the id alone."""

    trial_id: str


class RecordingScheduler(FIFOScheduler):  # type: ignore[misc]
    """A scheduler of Ray's whose verdicts are recorded.

    Args:
        inner: the scheduler that judges.
        recorder: the recorder's handle, told of each trial that goes on.
    """

    def __init__(self, inner: TrialScheduler, recorder: Any) -> None:
        super().__init__()
        self._inner, self._recorder = inner, recorder
        self.stopped: set[str] = set()

    def replay(self, trials: Iterable[TrialRecord]) -> None:
        """Tell the scheduler the scores of earlier launches.

        Rungs without a verdict are left out: their trials will report them again.
        """
        for trial in trials:
            stand_in = _Remembered(f"earlier-{trial.number}")
            judged = trial.state in ENDED
            for rung in trial.rungs:
                if judged or rung.passed:
                    result = {SAMPLES: rung.place, SCORE: rung.score}
                    self._inner.on_trial_add(None, stand_in)
                    self._inner.on_trial_complete(None, stand_in, result)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Forward the event to the wrapped scheduler."""
        self._inner.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Judge a rung, and record the verdict."""
        verdict: str = self._inner.on_trial_result(tune_controller, trial, result)
        if verdict == TrialScheduler.CONTINUE:
            self._recorder.passed.remote(trial.config["number"])
        elif verdict == TrialScheduler.STOP:
            self.stopped.add(trial.trial_id)
        return verdict

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Forward the event to the wrapped scheduler."""
        self._inner.on_trial_complete(tune_controller, trial, result)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Forward the event to the wrapped scheduler."""
        self._inner.on_trial_error(tune_controller, trial)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Forward the event to the wrapped scheduler."""
        self._inner.on_trial_remove(tune_controller, trial)

    def debug_string(self) -> str:
        """The wrapped scheduler's own text."""
        return str(self._inner.debug_string())


class _EndRecorder(tune.Callback):  # type: ignore[misc]
    """Records the end of each trial, which only the driver knows."""

    def __init__(
        self,
        sweep: RunDir,
        recorder: Any,
        suggestions: Suggestions | Repeated,
        scheduler: RecordingScheduler,
    ) -> None:
        self._sweep, self._recorder = sweep, recorder
        self._suggestions, self._scheduler = suggestions, scheduler

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Record a trial that was stopped, failed or finished."""
        result = trial.last_result or {}
        if trial.trial_id in self._scheduler.stopped:
            rung = result.get("rung", 0) + 1
            self._end(trial, "stopped", f"the scheduler stopped it at rung {rung}")
        elif result.get("done") and not result.get(FAILED):
            self._end(trial, "finished", "")
        elif result.get(FAILED):
            self._end(trial, "failed", "")

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Record that a trial lost its process and gets another."""
        self._recorder.lost.remote(trial.config["number"])

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Record that Tune gave a trial up."""
        error = trial.get_error()
        reason = last_line(error) if error is not None else "its process was lost"
        self._end(trial, "failed", f"given up after {trial.num_failures} losses: {reason}")

    def _end(self, trial: Any, state: str, reason: str) -> None:
        number = trial.config["number"]
        found = ray.get(self._recorder.end.remote(number, state, reason))
        self._suggestions.ended(found)
        # No training goes on from them, and the bundle has the weights.
        trial_dir(self._sweep, number).delete("checkpoints")


class _Poller:
    """A thread that polls the recorder while the driver waits in `fit`."""

    def __init__(self, recorder: Any, on_progress: OnProgress | None) -> None:
        self._recorder, self._on_progress = recorder, on_progress
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> None:
        if self._on_progress is not None:
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._on_progress is not None:
            self._thread.join()

    def _poll(self) -> None:
        assert self._on_progress is not None
        while not self._stop.wait(POLL_S):
            self._on_progress(*ray.get(self._recorder.snapshot.remote()))


def _open_recorder(record: SweepRecord, launch: Launch) -> Any:
    """Start the recorder on the driver's node, where SQLite and TensorBoard's files are."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    recorder = (
        ray.remote(SweepRecorder)
        .options(num_cpus=0, scheduling_strategy=here)
        .remote(record=record.model_dump_json(), storage=RunDir(launch.storage).uri)
    )
    ray.get(recorder.ready.remote())
    return recorder
