"""Launch of a training on Ray: plan, preflight, TorchTrainer, failures, progress."""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import ray.train
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mimray.trainers.cluster import connected
from mimray.trainers.config.names import check_name
from mimray.trainers.config.run import Plan, Recipe, continued, differences, parse_plan, resolve
from mimray.trainers.data.account import Account
from mimray.trainers.data.selection import open_training, with_classes
from mimray.trainers.data.workers import start_fork_server
from mimray.trainers.errors import (
    DataError,
    MimrayError,
    ResourceError,
    RunConflictError,
    StoppedError,
)
from mimray.trainers.lifeline import WorkerLifeline
from mimray.trainers.methods.needs import (
    check_outside,
    initial_lines,
    keep_needs,
    with_needs,
)
from mimray.trainers.preflight import WorkerResources, preflight
from mimray.trainers.recorder import NAMESPACE, Launch, RunLink, RunRecorder, RunState
from mimray.trainers.resizing import SaveBeforeResizing
from mimray.trainers.stopping import interruptible
from mimray.trainers.storage import RunDir, check_seen, claim
from mimray.trainers.tracking import check_reachable
from mimray.trainers.weights import fetcher

logger = logging.getLogger(__name__)

POLL_S = 0.5
# The words of torch on GPUs and CPUs, and of Ray where it ends a worker to save its node.
_MEMORY = re.compile(r"out of memory|OutOfMemory|MemoryError|allocate memory|low on memory", re.I)
_LOST = (RayActorError, OutOfMemoryError)
COLLECTIVE_TIMEOUT_S = 1800
STORAGE_PATIENCE_S = 300.0
RESIZE_AFTER_S = 60.0
CLOSE_WITHIN_S = 10.0


@dataclass(frozen=True)
class Job:
    """A user's request for one training.

    Attributes:
        data: path or URI of the training pictures.
        name: the run's name.
        storage: path or URI of the folder of runs; the run is `<storage>/<name>`.
        fresh: True to delete an existing run and start over.
        command: the command line, for the record.
    """

    recipe: Recipe
    data: str
    name: str
    storage: str
    fresh: bool = False
    command: str = ""

    @property
    def run(self) -> RunDir:
        """The run's directory."""
        return RunDir(self.storage) / self.name


@dataclass(frozen=True)
class Outcome:
    """The result of a finished job.

    Attributes:
        last: the last row of metrics.
    """

    run: RunDir
    plan: Plan
    last: dict[str, Any]


def prepare(job: Job, account: Account | None = None, notes: list[str] | None = None) -> Plan:
    """Resolve a job into its plan and check that against the run's directory.

    Needs no cluster and writes nothing.

    Args:
        job: the job.
        account: takes the count of what is passed over or merged in finding the data.
        notes: takes sentences about the run, for people.

    Raises:
        ConfigError: the recipe does not fit the data, the workers or a bundle it needs; or the
            name is not one folder's.
        DataError: the method learns classes, which the pictures do not have; or there are no
            pictures for the running probe, or no labels.
        BundleError: a bundle that the recipe needs is missing or damaged.
        RunConflictError: the directory holds a run of another recipe or other data; or it is to be
            started over, but is no run or holds a bundle that the recipe needs.
    """
    from mimray.trainers.engine.average import check_average
    from mimray.trainers.engine.checkpoints import steps_made
    from mimray.trainers.engine.deepspeed_keys import check_known
    from mimray.trainers.engine.optim import check_trained
    from mimray.trainers.evaluation.running import check_probe, placed_probe

    check_name("run", job.name)
    if job.fresh and job.run.exists() and not job.run.exists("plan.json"):
        raise RunConflictError(
            f"{job.run} exists and is not a run, so --fresh will not delete it",
            hint="choose another --name, or remove it yourself",
        )
    check_average(job.recipe)
    kept = job.run if job.run.exists("plan.json") and not job.fresh else None
    recipe = placed_probe(with_needs(job.recipe, fetcher(job.recipe), kept))
    if job.fresh:
        check_outside(recipe, job.run)
    source = open_training(job.data, recipe)
    if source.enough_cache_mib > recipe.data.cache_mib:
        logger.warning(
            "%s may be sorted and is large: to mix it, %d MiB of it are kept on local disk, and "
            "data.cache_mib is %d, so that nearly every picture reads its row group again; "
            "--set data.cache_mib=%d is enough, "
            "`mimray data ingest` makes a dataset that needs no cache",
            job.data,
            source.enough_cache_mib,
            recipe.data.cache_mib,
            source.enough_cache_mib,
        )
    elif source.reads_per_epoch > 1:
        logger.warning(
            "%s may be sorted and is large: to mix it, each row group is read %.0f times an epoch; "
            "`mimray data ingest` makes a dataset that is read once, "
            "--set data.cache_mib=%d keeps all of this one on local disk",
            job.data,
            source.reads_per_epoch,
            -(-source.num_bytes >> 20),
        )
    if account is not None:
        account.merge(source.account)
    recipe = with_classes(recipe, source)
    plan = resolve(recipe, source.facts, recipe.resources.num_workers.max)
    check_known(plan)
    check_trained(plan)
    about_probe = check_probe(recipe, source)
    if notes is not None and about_probe:
        notes.append(about_probe)
    if job.fresh or not job.run.exists("plan.json"):
        return plan
    hint = "--fresh starts the run over, another --name keeps it"
    before = parse_plan(job.run.read("plan.json"), f"{job.run}/plan.json", hint)
    changed = differences(before, plan)
    if changed:
        longest = f"--steps {before.steps} goes on with it, " if plan.steps < before.steps else ""
        raise RunConflictError(
            f"{job.run} holds a run of another recipe: " + "; ".join(changed),
            hint=f"{longest}--fresh starts over, another --name keeps both",
        )
    return continued(before, plan, partial(steps_made, job.run))


def begins_with(job: Job, plan: Plan) -> list[str]:
    """Sentences for people on the weights that a job begins with; none if they are fresh.

    Args:
        job: the job.
        plan: a result of `prepare`.
    """
    return initial_lines(plan.recipe, job.recipe, fetcher(plan.recipe), job.run)


@connected()
def pretrain(
    job: Job, plan: Plan, on_progress: Callable[[RunState], None] | None = None
) -> Outcome:
    """Run a job on Ray (see `connected`), continuing an existing run.

    In the main thread, SIGINT and SIGTERM end it: the first after a checkpoint, the next at once.

    Args:
        job: the job to run.
        plan: a result of `prepare`.
        on_progress: called about twice a second with the run's state.

    Raises:
        ResourceError: the cluster can never provide the plan's resources.
        StoppedError: a signal ended it.
        MimrayError: a worker raised it, or the run gave up after too many failures.
    """
    run = job.run
    share = preflight(plan)
    if job.fresh:
        run.delete()
    run.create()
    launch_id = uuid.uuid4().hex
    claim(run, launch_id)
    run.write("plan.json", plan.model_dump_json(indent=2).encode())
    keep_needs(plan.recipe, run, fetcher(plan.recipe))

    recorder, opening = _start_recorder(job, plan, launch_id)
    watcher = _Watcher(recorder, on_progress)
    config = {
        "plan": plan.model_dump_json(),
        "run": run.uri,
        "name": job.name,
        "command": job.command,
        "launch_id": launch_id,
        "recorder": recorder,
    }
    trainer = workers(_work, config, plan, run, share)
    try:
        state, failure = _follow(trainer, recorder, watcher)
        ray.get(opening)
    except OutOfMemoryError as error:  # Ray's own processes were killed, or the recorder
        raise _gave_up(error, plan, run) from error
    if state.error is None and failure is not None:
        state.error = _gave_up(failure, plan, run)
    if not isinstance(state.error, RunConflictError):  # the tracked run is the other launch's
        ray.get(recorder.close.remote(state.error))
    ray.kill(recorder)
    if state.error is not None:
        raise state.error from failure
    run.delete(".ray")
    return Outcome(run, plan, state.row)


def _follow(
    trainer: TorchTrainer, recorder: Any, watcher: _Watcher
) -> tuple[RunState, BaseException | None]:
    """Train to an end; gives the state at it, and Ray Train's failure if there is one.

    Raises:
        StoppedError: a signal ended it at once.
        OutOfMemoryError: a node without memory lost the processes that would tell.
    """
    failure: BaseException | None = None
    try:
        with watcher:
            interruptible(trainer.fit, lambda signal: ray.get(recorder.stop.remote(signal)))
    except ray.train.TrainingFailedError as error:
        failure = error
    except StoppedError as error:  # at once, as far as MLflow lets it
        ray.wait([recorder.close.remote(error)], timeout=CLOSE_WITHIN_S)
        raise
    return ray.get(recorder.state.remote()), failure


def workers(
    work: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    plan: Plan,
    run: RunDir,
    share: WorkerResources,
) -> TorchTrainer:
    """The TorchTrainer of a plan's workers, which restarts them after a failure.

    Args:
        work: the function that each worker runs.
        config: the argument of `work`; of an elastic run, with its `recorder`.
        plan: the run's plan, with the number of workers and of failures survived.
        run: the run's directory, in which Ray keeps its own files meanwhile.
        share: resources of each worker.
    """
    asked = _workers_asked(plan)
    return TorchTrainer(
        work,
        train_loop_config=config,
        torch_config=TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=asked,
            elastic_resize_monitor_interval_s=RESIZE_AFTER_S,
            use_gpu=share.gpus > 0,
            resources_per_worker={"CPU": share.cpus, **({"GPU": 1} if share.gpus else {})},
        ),
        # Ray silently resumes a known name. Resuming is done here, so each start has a new name.
        run_config=RunConfig(
            name=uuid.uuid4().hex,
            storage_path=(run / ".ray").uri,
            failure_config=FailureConfig(max_failures=plan.recipe.resources.max_failures),
            callbacks=None if isinstance(asked, int) else [SaveBeforeResizing(config["recorder"])],
        ),
    )


def _workers_asked(plan: Plan) -> int | tuple[int, int]:
    """The number of workers in Ray Train's terms: one, or the least and the most."""
    least = plan.recipe.resources.num_workers.min
    return plan.world_size if least >= plan.world_size else (least, plan.world_size)


def finished(job: Job, plan: Plan) -> Outcome | None:
    """The outcome of a job if its run is complete, else None; needs no cluster."""
    from mimray.trainers.bundles import CARD
    from mimray.trainers.engine.metrics import read_metrics

    run = job.run
    if job.fresh or not run.exists(f"bundle/{CARD}"):
        return None
    rows = read_metrics(run)
    return Outcome(run, plan, rows[-1]) if rows and rows[-1]["step"] >= plan.steps else None


def _start_recorder(job: Job, plan: Plan, launch_id: str) -> tuple[Any, ray.ObjectRef[None]]:
    """Start the actor that records a run, on the driver's node, where MLflow's SQLite file is.

    Returns:
        Its handle, and what tells that it is open: the workers start meanwhile, and wait for it.

    Raises:
        StorageError: no MLflow server answers.
    """
    tracking = os.environ.get("MLFLOW_TRACKING_URI")
    check_reachable(tracking or "")
    cluster = ray.get_runtime_context()
    here = NodeAffinitySchedulingStrategy(cluster.get_node_id(), soft=False)
    launch = Launch(
        launch_id, socket.gethostname(), cluster.gcs_address, job.command, round(time.time(), 3)
    )
    recorder = (
        ray.remote(RunRecorder)
        .options(name=launch_id, namespace=NAMESPACE, num_cpus=0, scheduling_strategy=here)
        .remote(
            run_uri=job.run.uri,
            storage=RunDir(job.storage).uri,
            plan=plan.model_dump_json(),
            launch=launch,
            fresh=job.fresh,
            tracking=tracking,
        )
    )
    return recorder, recorder.open.remote()


def _work(config: dict[str, Any]) -> None:
    """Train on one worker; called again after a failure, it continues."""
    plan = Plan.model_validate_json(config["plan"])
    if plan.recipe.data.stream != "ray":
        start_fork_server(plan.recipe.data.num_workers)

    import ray.train.torch

    from mimray.trainers.engine.deepspeed import smaller_group
    from mimray.trainers.engine.export import write_bundle
    from mimray.trainers.engine.loop import train
    from mimray.trainers.evaluation.running import RunningProbe

    context = ray.train.get_context()
    rank, there = context.get_world_rank(), context.get_world_size()
    plan = plan.for_workers(there)
    run = RunDir(config["run"], STORAGE_PATIENCE_S)
    link = RunLink(config["recorder"], plan.world_size)
    if link.failed():
        return  # trying again cannot mend this failure; let the group end
    if plan.world_size < there and not smaller_group(plan.world_size, COLLECTIVE_TIMEOUT_S):
        return  # the global batch cannot be shared with this worker
    try:
        check_seen(run)
        source = open_training(plan.data.uri, plan.recipe)
        if source.facts.fingerprint != plan.data.fingerprint:
            raise DataError(
                f"{plan.data.uri} is not the same data on every node",
                hint="use storage that all nodes see, such as s3://",
            )
        device = ray.train.torch.get_device()
        probed = plan.recipe.evaluation.every_steps > 0
        probe = RunningProbe(plan, run, device, link.scoring) if probed else None
        with link.warnings(), WorkerLifeline(config["recorder"], rank) as lifeline:
            trained = train(
                plan,
                run,
                source,
                device=device,
                observer=link,
                launch_id=config["launch_id"],
                probe=probe,
                lifeline=lifeline,
            )
            if rank == 0:
                with lifeline.pause("export"):
                    card = write_bundle(
                        run,
                        plan,
                        trained.state,
                        step=plan.steps,
                        name=config["name"],
                        command=config["command"],
                    )
                for warning in card.warnings:
                    logger.warning("%s", warning)
        if rank == 0:
            link.flush()
    except MimrayError as error:
        link.fail(error)
        if plan.world_size > 1 and not error.on_every_rank:
            raise  # other ranks may be waiting for this one; Ray Train ends the group
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if _MEMORY.search(f"{type(error).__name__}: {error}"):
            link.fail(_out_of_memory(plan, f"rank {rank} ran out of memory"))
        raise


def _gave_up(failure: BaseException, plan: Plan, run: RunDir) -> MimrayError:
    """The end of a run whose workers were lost too often."""
    if _MEMORY.search(str(failure)):
        return _out_of_memory(plan, "a worker's node ran out of memory")
    error = MimrayError(
        f"the run gave up after {plan.recipe.resources.max_failures} failures: "
        f"{last_line(failure)}",
        hint=f"the same command continues from the last checkpoint in {run}",
    )
    error.exit_code = 1
    return error


def _out_of_memory(plan: Plan, what: str) -> ResourceError:
    """The end of a run that does not fit, which another start cannot mend.

    Args:
        plan: the run's plan.
        what: what ran out, in a few words.
    """
    half = max(1, plan.micro_batch_size // 2)
    cures = ["engine.activation_checkpointing=true"]
    if half < plan.micro_batch_size:
        cures.insert(0, f"engine.micro_batch_size={half}")
    return ResourceError(
        f"{what} with micro batches of {plan.micro_batch_size} pictures",
        hint=" or ".join(f"--set {cure}" for cure in cures)
        + ", from the last checkpoint; `mimray plan` forecasts the memory of each",
    )


class _Watcher:
    """Polls the recorder while the driver waits in `fit`: for progress, and for workers that hang.

    Args:
        recorder: the handle of the recorder's actor.
        on_progress: called with the run's state at every poll and at the end.
    """

    def __init__(self, recorder: Any, on_progress: Callable[[RunState], None] | None) -> None:
        self._recorder = recorder
        self._on_progress = on_progress or (lambda state: None)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(*_LOST):
            self._tell()

    def _poll(self) -> None:
        while not self._stop.wait(POLL_S):
            with suppress(*_LOST):  # for a while, or for good, which `fit` finds out too
                ray.get(self._recorder.look_after.remote())
                self._tell()

    def _tell(self) -> None:
        self._on_progress(ray.get(self._recorder.state.remote()))


def last_line(error: BaseException) -> str:
    """The last line of an error's text, which in Ray's errors is a whole traceback."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
