"""One trial: training with pauses, a score at each. In Tune's process, or in workers of its own."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray import tune

from mimray.trainers.config.resources import WorkerRange
from mimray.trainers.config.run import Plan
from mimray.trainers.data.selection import open_training
from mimray.trainers.engine.export import write_bundle
from mimray.trainers.engine.loop import Trained, stages
from mimray.trainers.errors import MimrayError, NonFiniteLossError, ResourceError
from mimray.trainers.launch import last_line, workers
from mimray.trainers.methods.needs import keep_needs
from mimray.trainers.preflight import WorkerResources
from mimray.trainers.storage import RunDir, check_seen, claim
from mimray.trainers.weights import fetcher
from mimray.tuning.bases import Params
from mimray.tuning.capacity import Capacity
from mimray.tuning.plan import SweepPlan
from mimray.tuning.record import Rung, TrialRecord, trial_dir
from mimray.tuning.recorder import TrialLink
from mimray.tuning.score import score_bundle
from mimray.tuning.search import SAMPLES, SCORE

logger = logging.getLogger(__name__)

FAILED = "failed"


@dataclass(frozen=True)
class LaunchContext:
    """The values that all trials of a launch share.

    Attributes:
        plan: the sweep's plan.
        capacity: the resources of a trial.
        recorder: the handle of the actor to report to.
        launch_id: the launch's id; workers of an earlier launch stop at their next write.
        cache_mib: the bound of the decoded pictures that trials of one node share.
    """

    plan: SweepPlan
    capacity: Capacity
    recorder: Any
    launch_id: str
    cache_mib: int


class Trial(tune.Trainable):  # type: ignore[misc]
    """Tune's trainable: a step trains to the next rung and scores it.

    The state lies in the trial's directory, a run's directory with checkpoints; Tune keeps none.
    One process serves trial after trial.
    """

    def setup(self, config: dict[str, Any], context: LaunchContext) -> None:
        """Begin with the first trial of this process."""
        self._context = context
        self._start(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Go on with another trial."""
        self.cleanup()
        self._start(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Train to the next rung that is not scored yet, and score it."""
        try:
            rung = next(self._rungs)
        except (MimrayError, torch.OutOfMemoryError) as error:
            # Ending the trial at once: another try would fail alike.
            reason = f"{type(error).__name__}: {last_line(error)}"
            ray.get(self._context.recorder.end.remote(self._number, "failed", reason))
            self.cleanup()
            return {FAILED: True, "done": True}
        ended = rung.number == len(self._context.plan.rung_samples) - 1
        return {SAMPLES: rung.place, SCORE: rung.score, "rung": rung.number, "done": ended}

    def cleanup(self) -> None:
        """Release the engine and the decode processes."""
        self._rungs.close()
        # Engines hold reference cycles, and the next trial needs the memory at once.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save nothing: the trial's directory has its checkpoints."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Load nothing: the loop finds its checkpoint itself."""

    def _start(self, config: dict[str, Any]) -> None:
        self._number = config["number"]
        self._rungs = _rungs(self._context, self._number, config["params"])


def _rungs(context: LaunchContext, number: int, params: Params) -> Generator[Rung, None, None]:
    """The rungs of a trial that Tune has not judged yet, as they are reached."""
    recorder, sweep = context.recorder, context.plan
    begin = partial(recorder.begin.remote, number, params, context.capacity.devices)
    try:
        plan = _with_resources(sweep.trial(params), context)
    except MimrayError:
        ray.get(begin(""))
        raise
    known: TrialRecord = ray.get(begin(plan.model_dump_json()))
    check_seen(sweep.directory)
    run = trial_dir(sweep.directory, number)
    run.create()
    claim(run, context.launch_id)
    run.write("plan.json", plan.model_dump_json(indent=2).encode())
    keep_needs(plan.recipe, run, fetcher(plan.recipe))
    # A rung that was scored as the driver died, before Tune could judge it, is reported again.
    for rung in known.rungs:
        if not rung.passed:
            yield rung
    train = _here if context.capacity.num_workers == 1 else _in_workers
    for rung in train(context, number, plan, run, {rung.number for rung in known.rungs}):
        ray.get(recorder.rung.remote(number, rung))
        yield rung


def _here(
    context: LaunchContext, number: int, plan: Plan, run: RunDir, known: set[int]
) -> Iterator[Rung]:
    """Train in this process; the engine stays warm from rung to rung."""
    device = torch.device("cuda", 0) if context.capacity.gpus else torch.device("cpu")
    _join_group(device)
    torch.set_num_threads(context.capacity.cpus)  # Ray sets OMP_NUM_THREADS to 1
    pauses = context.plan.pauses(plan)
    source = open_training(plan.data.uri, plan.recipe)
    training = stages(
        plan,
        run,
        source,
        device=device,
        observer=TrialLink(context.recorder, number),
        launch_id=context.launch_id,
        pauses=pauses.keys(),
    )
    with contextlib.closing(training):  # type: ignore[type-var]
        for trained in training:
            if pauses[trained.step] not in known:
                yield _scored(context, number, plan, run, trained, device)


def _in_workers(
    context: LaunchContext, number: int, plan: Plan, run: RunDir, known: set[int]
) -> Iterator[Rung]:
    """Train in a `TorchTrainer`, started anew for each rung; devices are free in between."""
    share = WorkerResources(gpus=int(context.capacity.gpus), cpus=context.capacity.cpus)
    for step, rung in context.plan.pauses(plan).items():
        if rung in known:
            continue
        config = {
            "context": context,
            "number": number,
            "plan": plan.model_dump_json(),
            "run": run.uri,
            "until": step,
        }
        try:
            workers(_work, config, plan, run, share).fit()
        except ray.train.TrainingFailedError as error:
            raise ResourceError(
                f"gave up after {plan.recipe.resources.max_failures} losses: {last_line(error)}"
            ) from error
        record: TrialRecord = ray.get(context.recorder.record.remote(number))
        if record.state == "failed":
            raise MimrayError(record.reason)
        yield record.rungs[-1]


def _work(config: dict[str, Any]) -> None:
    """Train on one worker of a trial; called again after a failure, it continues."""
    import ray.train.torch

    context, number = config["context"], config["number"]
    plan, run = Plan.model_validate_json(config["plan"]), RunDir(config["run"])
    rank = ray.train.get_context().get_world_rank()
    device = ray.train.torch.get_device()
    try:
        check_seen(run)
        training = stages(
            plan,
            run,
            open_training(plan.data.uri, plan.recipe),
            device=device,
            observer=TrialLink(context.recorder, number),
            launch_id=context.launch_id,
            pauses=(config["until"],),
        )
        trained = next(t for t in training if t.step == config["until"])
        if rank == 0:
            rung = _scored(context, number, plan, run, trained, device)
            ray.get(context.recorder.rung.remote(number, rung))
        dist.barrier()
    except MimrayError as error:
        ray.get(context.recorder.end.remote(number, "failed", f"{type(error).__name__}: {error}"))
        if not error.on_every_rank:
            raise  # others may be waiting for this rank; Ray Train ends the group


def _scored(
    context: LaunchContext,
    number: int,
    plan: Plan,
    run: RunDir,
    trained: Trained,
    device: torch.device,
) -> Rung:
    """Write the encoder's bundle and score it."""
    sweep = context.plan
    write_bundle(
        run,
        plan,
        trained.state,
        step=trained.step,
        name=f"{sweep.name}/{run.name}",
        command=sweep.command,
    )
    found = score_bundle(
        run / "bundle",
        sweep.config.score,
        plan.data.uri,
        seed=sweep.config.seed,
        device=str(device),
        command=sweep.command,
    )
    if not math.isfinite(found.score):
        raise NonFiniteLossError(f"the {sweep.config.score.task} score is {found.score}")
    rung = sweep.pauses(plan)[trained.step]
    return Rung(
        number=rung,
        step=trained.step,
        samples=sweep.rung_samples[rung]
        if sweep.flops is None
        else trained.step * plan.global_batch,
        budget=None if sweep.flops is None else sweep.rung_samples[rung],
        score=found.score,
        standard_error=found.standard_error,
        num_pictures=found.num_pictures,
        evidence=found.evidence,
        metrics=found.metrics,
        train_s=round(trained.seconds, 3),
        score_s=round(found.seconds, 3),
    )


def _with_resources(plan: Plan, context: LaunchContext) -> Plan:
    """The plan with the trial's resources, which change nothing that is learnt."""
    capacity, recipe = context.capacity, plan.recipe
    num_workers = recipe.data.num_workers
    if not capacity.gpus:
        # On one CPU a decode process would take turns with the training.
        num_workers = min(num_workers, capacity.cpus - 1)
    data = {"num_workers": num_workers, "decoded_cache_mib": context.cache_mib}
    resources = {
        "num_workers": WorkerRange(min=capacity.num_workers, max=capacity.num_workers),
        "cpus_per_worker": capacity.cpus,
        "device": "gpu" if capacity.gpus else "cpu",
        "max_failures": context.plan.config.resources.max_failures,
    }
    changes = {
        "data": recipe.data.model_copy(update=data),
        "resources": recipe.resources.model_copy(update=resources),
    }
    return plan.model_copy(update={"recipe": recipe.model_copy(update=changes)})


def _join_group(device: torch.device) -> None:
    """Join a process group of this process alone; DeepSpeed keeps it, so it outlives trials."""
    from mimray.trainers.engine.deepspeed import prepare_process

    prepare_process(device)
    if not dist.is_initialized():
        meeting = os.path.join(tempfile.mkdtemp(prefix="mimray-"), "meeting")
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{meeting}", rank=0, world_size=1)
