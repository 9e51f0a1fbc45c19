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

from mimray.trainers.config.run import Plan
from mimray.trainers.data.selection import open_training
from mimray.trainers.engine.export import write_bundle
from mimray.trainers.engine.loop import Trained, stages
from mimray.trainers.errors import MimrayError, NonFiniteLossError, ResourceError
from mimray.trainers.launch import Share, last_line, workers
from mimray.trainers.methods.needs import keep_needs
from mimray.trainers.storage import RunDir, check_seen, claim
from mimray.tuning.capacity import Capacity
from mimray.tuning.plan import SweepPlan
from mimray.tuning.record import Rung, TrialRecord, trial_dir
from mimray.tuning.recorder import BoardLink
from mimray.tuning.score import score_bundle
from mimray.tuning.search import SAMPLES, SCORE
from mimray.tuning.space import Params

logger = logging.getLogger(__name__)

FAILED = "failed"


@dataclass(frozen=True)
class Surroundings:
    """What is the same for all trials of a launch.

    Attributes:
        plan: of the sweep.
        capacity: what a trial holds.
        board: the actor to report to.
        launch_id: of this launch; workers of an earlier one stop at their next write.
        cache_mib: bound of the decoded pictures that trials of one node share.
    """

    plan: SweepPlan
    capacity: Capacity
    board: Any
    launch_id: str
    cache_mib: int


class Trial(tune.Trainable):  # type: ignore[misc]
    """What Tune runs: a step is the way to the next rung, scored.

    Its state lies in the trial's directory, a run's directory with checkpoints; Tune keeps none.
    One process serves trial after trial.
    """

    def setup(self, config: dict[str, Any], around: Surroundings) -> None:
        """Begin with the first trial of this process."""
        self._around = around
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
            # Trying again cannot mend it.
            reason = f"{type(error).__name__}: {last_line(error)}"
            ray.get(self._around.board.end.remote(self._number, "failed", reason))
            self.cleanup()
            return {FAILED: True, "done": True}
        ended = rung.samples >= self._around.plan.rung_samples[-1]
        return {SAMPLES: rung.samples, SCORE: rung.score, "rung": rung.number, "done": ended}

    def cleanup(self) -> None:
        """Let go of the engine and the decode processes."""
        self._rungs.close()
        # An engine holds itself in cycles, and the next trial wants the memory at once.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the trial's directory has its checkpoints."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing, likewise."""

    def _start(self, config: dict[str, Any]) -> None:
        self._number = config["number"]
        self._rungs = _rungs(self._around, self._number, config["params"])


def _rungs(around: Surroundings, number: int, params: Params) -> Generator[Rung, None, None]:
    """The rungs of a trial that Tune has not judged yet, as they are reached."""
    board, sweep = around.board, around.plan
    begin = partial(board.begin.remote, number, params, around.capacity.devices)
    try:
        plan = _with_resources(sweep.trial(params), around)
    except MimrayError:
        ray.get(begin(""))
        raise
    known: TrialRecord = ray.get(begin(plan.model_dump_json()))
    check_seen(sweep.directory)
    run = trial_dir(sweep.directory, number)
    run.create()
    claim(run, around.launch_id)
    run.write("plan.json", plan.model_dump_json(indent=2).encode())
    keep_needs(plan.recipe, run)
    # What was scored as the driver died, before Tune could judge it, is told again.
    for rung in known.rungs:
        if not rung.passed:
            yield rung
    train = _here if around.capacity.num_workers == 1 else _in_workers
    for rung in train(around, number, plan, run, {rung.number for rung in known.rungs}):
        ray.get(board.rung.remote(number, rung))
        yield rung


def _here(
    around: Surroundings, number: int, plan: Plan, run: RunDir, known: set[int]
) -> Iterator[Rung]:
    """Train in this process; the engine stays warm from rung to rung."""
    device = torch.device("cuda", 0) if around.capacity.gpus else torch.device("cpu")
    _join_group(device)
    torch.set_num_threads(around.capacity.cpus)  # Ray sets OMP_NUM_THREADS to 1
    pauses = around.plan.pauses(plan)
    source = open_training(plan.data.uri, plan.recipe)
    training = stages(
        plan,
        run,
        source,
        device=device,
        observer=BoardLink(around.board, number),
        launch_id=around.launch_id,
        pauses=pauses.keys(),
    )
    with contextlib.closing(training):  # type: ignore[type-var]
        for trained in training:
            if pauses[trained.step] not in known:
                yield _scored(around, number, plan, run, trained, device)


def _in_workers(
    around: Surroundings, number: int, plan: Plan, run: RunDir, known: set[int]
) -> Iterator[Rung]:
    """Train in a `TorchTrainer`, one start a rung; devices are free in between."""
    share = Share(gpus=int(around.capacity.gpus), cpus=around.capacity.cpus)
    for step, rung in around.plan.pauses(plan).items():
        if rung in known:
            continue
        config = {
            "around": around,
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
        record: TrialRecord = ray.get(around.board.record.remote(number))
        if record.state == "failed":
            raise MimrayError(record.reason)
        yield record.rungs[-1]


def _work(config: dict[str, Any]) -> None:
    """What each worker of a trial runs; called again after a failure, it continues."""
    import ray.train.torch

    around, number = config["around"], config["number"]
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
            observer=BoardLink(around.board, number),
            launch_id=around.launch_id,
            pauses=(config["until"],),
        )
        trained = next(t for t in training if t.step == config["until"])
        if rank == 0:
            rung = _scored(around, number, plan, run, trained, device)
            ray.get(around.board.rung.remote(number, rung))
        dist.barrier()
    except MimrayError as error:
        ray.get(around.board.end.remote(number, "failed", f"{type(error).__name__}: {error}"))
        if not error.on_every_rank:
            raise  # others may be waiting for this rank; Ray Train ends the group


def _scored(
    around: Surroundings,
    number: int,
    plan: Plan,
    run: RunDir,
    trained: Trained,
    device: torch.device,
) -> Rung:
    """Write the encoder as it is now, and score it."""
    sweep = around.plan
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
        samples=sweep.rung_samples[rung],
        score=found.score,
        metrics=found.metrics,
        train_s=round(trained.seconds, 3),
        score_s=round(found.seconds, 3),
    )


def _with_resources(plan: Plan, around: Surroundings) -> Plan:
    """The plan with what a trial has at hand; none of it changes what is learnt."""
    capacity, recipe = around.capacity, plan.recipe
    num_workers = recipe.data.num_workers
    if not capacity.gpus:
        # On one CPU a decode process would only take turns with the training.
        num_workers = min(num_workers, capacity.cpus - 1)
    data = {"num_workers": num_workers, "decoded_cache_mib": around.cache_mib}
    resources = {
        "num_workers": capacity.num_workers,
        "cpus_per_worker": capacity.cpus,
        "device": "gpu" if capacity.gpus else "cpu",
        "max_failures": around.plan.config.resources.max_failures,
    }
    changes = {
        "data": recipe.data.model_copy(update=data),
        "resources": recipe.resources.model_copy(update=resources),
    }
    return plan.model_copy(update={"recipe": recipe.model_copy(update=changes)})


def _join_group(device: torch.device) -> None:
    """A process group of this process alone; DeepSpeed remembers it, so it outlives trials."""
    from mimray.trainers.engine.deepspeed import prepare_process

    prepare_process(device)
    if not dist.is_initialized():
        meeting = os.path.join(tempfile.mkdtemp(prefix="mimray-"), "meeting")
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{meeting}", rank=0, world_size=1)
