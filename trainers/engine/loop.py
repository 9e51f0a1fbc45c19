"""The training loop. Methods compute a loss; only this file calls backward and step."""

from __future__ import annotations

import hashlib
import logging
import math
import resource
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mimray.trainers.config.run import Plan
from mimray.trainers.data.loader import Place, Samples, collate, make_loader, training_order
from mimray.trainers.data.rng import sample_seeds
from mimray.trainers.data.sources import Source
from mimray.trainers.data.views import Inputs
from mimray.trainers.engine import checkpoints
from mimray.trainers.engine.average import with_average
from mimray.trainers.engine.clipping import clip_each
from mimray.trainers.engine.compiled import compile_blocks
from mimray.trainers.engine.deepspeed import (
    Engine,
    choose_precision,
    fixed_weights,
    follow,
    full_state,
    initialize,
    prepare_process,
)
from mimray.trainers.engine.metrics import MetricsLog, Speed
from mimray.trainers.engine.optim import FrozenGradients, set_hyperparameters
from mimray.trainers.engine.schedule import learning_rate
from mimray.trainers.errors import MimrayError, NonFiniteLossError, StoppedError
from mimray.trainers.lifeline import Lifeline
from mimray.trainers.methods.catalogue import build_method, inputs_of
from mimray.trainers.methods.inputs import arguments_of
from mimray.trainers.methods.lora import adapt
from mimray.trainers.methods.needs import load_needs
from mimray.trainers.models.blocks import checkpoint_activations
from mimray.trainers.storage import RunDir
from mimray.trainers.types import Batch, Notice, Panel

logger = logging.getLogger(__name__)

Row = dict[str, Any]
NO_LIFELINE = Lifeline()


class Observer(Protocol):
    """Callbacks of a training, on rank 0 only."""

    def resumed(self, step: int) -> None:
        """Called before the first update.

        Args:
            step: updates made by earlier starts; 0 for a fresh run.
        """

    def metrics(self, row: Row) -> None:
        """Called with each new row of `metrics.jsonl`, and the last one of an earlier start."""

    def pictures(self, step: int, panels: list[Panel]) -> None:
        """Called with the method's sheet of sample pictures.

        Args:
            step: updates made.
            panels: the columns of the sheet, from left to right.
        """


class Probe(Protocol):
    """A score of the encoder on the way.

    Attributes:
        every_steps: updates between two scores.
    """

    every_steps: int

    def wants(self, name: str) -> bool:
        """True for the names of the weights that it needs."""

    def __call__(
        self, step: int, state: Mapping[str, Tensor], alive: Callable[[], object]
    ) -> dict[str, float]:
        """Score the encoder, on rank 0 only, without a change to the training.

        Args:
            step: updates made.
            state: whole fp32 weights that it wants, on the host.
            alive: to be called within the time limit of a collective, for ranks that wait.

        Returns:
            Figures for the row of metrics.
        """


@dataclass(frozen=True)
class Trained:
    """Weights and metrics of a run at its end, or at a pause.

    Attributes:
        step: updates made.
        state: whole fp32 weights of the method, on the host.
        last: the last row of metrics.
        seconds: duration of the loop since the last pause, or since this start.
    """

    step: int
    state: dict[str, Tensor]
    last: Row
    seconds: float


@dataclass(frozen=True)
class _StepResult:
    loss: float
    grad_norm: float
    data_wait_s: float
    figures: dict[str, float]  # the method's terms and figures
    notice: Notice  # the largest of all ranks
    saving: bool  # some rank still brings a checkpoint to its store


def train(
    plan: Plan,
    run: RunDir,
    source: Source,
    *,
    device: torch.device,
    observer: Observer,
    launch_id: str = "",
    probe: Probe | None = None,
    lifeline: Lifeline = NO_LIFELINE,
) -> Trained:
    """Train a plan to its end; arguments and errors are those of `stages`."""
    *_, trained = stages(
        plan, run, source, device=device, observer=observer, launch_id=launch_id, probe=probe,
        lifeline=lifeline,
    )  # fmt: skip
    return trained


def stages(
    plan: Plan,
    run: RunDir,
    source: Source,
    *,
    device: torch.device,
    observer: Observer,
    launch_id: str = "",
    pauses: Collection[int] = (),
    probe: Probe | None = None,
    lifeline: Lifeline = NO_LIFELINE,
) -> Iterator[Trained]:
    """Train a plan with pauses, continuing from its newest undamaged checkpoint.

    Collective: every rank of the default process group iterates over it. It may be closed at a
    pause: a checkpoint is written before each, from which another start continues.

    Args:
        plan: the run's plan.
        run: the run's directory, which gets checkpoints and metrics and holds the bundles that the
            method needs.
        source: the training pictures.
        device: this rank's device.
        observer: the callbacks, used on rank 0.
        launch_id: identifier of the launch these workers belong to; empty for no check.
        pauses: steps at which to yield the weights, beside the last one.
        probe: the running probe, the same on every rank; None for none.
        lifeline: is told of each update, and of each pause between two; what it asks any rank
            for before an update, all do after it.

    Yields:
        The weights at each pause and at the end; at once if an earlier start stopped there.

    Raises:
        NonFiniteLossError: the loss is NaN or infinite; the update is not made.
        StorageError: a checkpoint could not be written.
        RunConflictError: a later launch has taken the run over.
        CheckpointError: no checkpoint of the run can be loaded.
        BundleError: a bundle that the run keeps is damaged, or not the one of the plan.
        StoppedError: a rank was asked to stop; the checkpoint is written.
    """
    recipe, rank = plan.recipe, dist.get_rank()
    prepare_process(device)
    precision = choose_precision(recipe.engine.precision, device)

    torch.manual_seed(recipe.seed)
    method = build_method(recipe)
    load_needs(method, run)
    adapt(method)
    with_average(method)
    fixed = fixed_weights(method)
    if recipe.engine.activation_checkpointing:
        checkpoint_activations(method)
    if recipe.engine.compile:
        compile_blocks(method, device)
        if rank == 0:
            logger.warning("engine.compile: the first update compiles, which may take minutes")
    gradients = FrozenGradients(method, recipe.optim)
    engine = initialize(method, plan, precision)
    earlier = tuple(length.hash for length in plan.lengths)
    identity = checkpoints.Identity(plan.hash, recipe.engine.zero_stage, precision, earlier)
    restored = checkpoints.load_newest(run, engine, identity)
    step = restored.step if restored else 0
    log: MetricsLog | None = None
    last: Row = {}
    if rank == 0:
        observer.resumed(step)
        log = MetricsLog(run, step, launch_id)
        last = log.last
        if last:
            observer.metrics(last)
    if step and (step in pauses or step == plan.steps):
        yield Trained(step, full_state(engine, fixed), last, 0.0)

    inputs = inputs_of(recipe)
    batches = make_loader(
        source,
        plan,
        inputs,
        rank=rank,
        first_step=step,
        pin_memory=device.type == "cuda",
    )
    shown = _shown_batch(plan, source, inputs)
    saver = checkpoints.Saver(
        run, engine, identity, keep=recipe.checkpoint.keep, launch_id=launch_id
    )
    speed, began = Speed(plan.global_batch), time.perf_counter()
    while step < plan.steps:
        gradients.step = step
        notice, saving = lifeline.step(), saver.busy
        try:
            result = _update(engine, plan, batches, inputs, step, device, notice, saving=saving)
        except MimrayError as error:  # such as a loss that is not finite: the rows before tell why
            if log is not None:
                log.flush()
            if error.on_every_rank:
                saver.finish()
            raise
        step += 1
        speed.add(result.data_wait_s)
        wanted = step == plan.steps or step in pauses
        probed = probe is not None and (step == plan.steps or _due(step, probe.every_steps))
        if wanted or probed or step % recipe.logging.every_steps == 0:
            last = _row(plan, step, result, speed, device)
            if probe is not None and probed:
                with lifeline.pause("running probe"):
                    last |= _score(engine, probe, step, fixed, device)
                speed.restart()
            if log is not None:
                log.append(last)
                observer.metrics(last)
        if wanted or _due(step, recipe.logging.pictures_every_steps):
            with lifeline.pause("pictures"):
                _show(engine, plan, shown, inputs, step, device, observer)
        if wanted or result.notice or _due(step, recipe.checkpoint.every_steps):
            with lifeline.pause("checkpoint"):
                checkpoints.together(log.flush if log is not None else lambda: None)
                saver.save(step=step, samples=step * plan.global_batch)
                if wanted or result.notice:
                    saver.finish()
            speed.restart()
        else:
            saver.settle(any_busy=result.saving)
        if result.notice is Notice.STOP and step < plan.steps:
            raise _stopped(step, plan.steps)
        if wanted:
            with lifeline.pause("export"):
                yield Trained(step, full_state(engine, fixed), last, time.perf_counter() - began)
            speed.restart()
            began = time.perf_counter()


def _update(
    engine: Engine,
    plan: Plan,
    batches: Iterator[Batch],
    inputs: Inputs,
    step: int,
    device: torch.device,
    notice: Notice = Notice.NONE,
    *,
    saving: bool = False,
) -> _StepResult:
    """One update: `accumulation` micro batches, one optimiser step."""
    set_hyperparameters(engine.optimizer, plan, step)
    # What is not drawn a sample depends on step and rank alone, so a continued run repeats it.
    torch.manual_seed(_device_seed(plan.recipe.seed, step, dist.get_rank()))
    engine.module.at_step(step, plan.length_at(step))
    sums = _Sums(device)
    waited = 0.0
    hidden_means: dict[str, Tensor] = {}
    for micro in range(plan.accumulation):
        began = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - began
        for problem in batch.problems:
            logger.warning("%s", problem)
        if batch.hidden:  # with the first one of a step, for all of its micro batches
            hidden_means = _hidden_means(batch, plan, device)
        count = batch.num_samples
        engine.module.at_batch(
            sample_seeds(plan.recipe.seed, batch.epoch[:count], batch.indices[:count])
        )
        output = engine(**arguments_of(batch, inputs, plan.recipe, device), **hidden_means)
        engine.backward(output.loss)
        sums.add({"loss": output.loss, **output.terms}, batch.indices)
        if micro == plan.accumulation - 1:
            sums.reduce(notice, saving=saving)
            if sums.not_finite:
                _refuse_update(step, sums.suspects, sums.not_finite)
            if plan.recipe.optim.clip_tensor_norm is not None:
                clip_each(engine, plan.recipe.optim.clip_tensor_norm)
        plain = _plain_grad_norm(engine) if engine.is_gradient_accumulation_boundary() else None
        engine.step()
    norm = plain if plain is not None else engine.get_global_grad_norm()
    applied = engine.was_step_applied()
    averages, ema = engine.module.averages, engine.module.ema
    if averages is not None and applied:
        follow(engine, averages, averages.momentum.at(step, plan.length_at(step)))
    means = sums.means(plan.accumulation * plan.world_size)
    settled = engine.module.after_step(step + 1)
    if ema is not None and applied:  # with the buffers that the method has just settled
        follow(engine, ema, ema.momentum.at(step, plan.length_at(step)))
    return _StepResult(
        loss=means.pop("loss"),
        grad_norm=float(norm) if norm is not None else math.nan,
        data_wait_s=waited,
        figures=means | settled,
        notice=sums.notice,
        saving=sums.saving,
    )


def _hidden_means(batch: Batch, plan: Plan, device: torch.device) -> dict[str, Tensor]:
    """Hidden patches of a picture, averaged over the global batch, by name; collective."""
    totals = torch.tensor(list(batch.hidden.values()), device=device)
    dist.all_reduce(totals)
    return dict(zip(batch.hidden, totals / plan.global_batch, strict=True))


class _Sums:
    """Sums of the loss and its terms over micro batches and ranks; counts of non-finite ones.

    One collective, and one wait for the device, tell all ranks these and the notices of each.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: list[str] = []
        self._totals = torch.zeros(0)
        self._sums: list[float] = []
        self._not_finite: list[float] = []
        self._finite: list[tuple[Tensor, np.ndarray]] = []
        self.notice = Notice.NONE
        self.saving = False

    def add(self, values: dict[str, Tensor], indices: np.ndarray) -> None:
        """Add the values of a micro batch, the loss first, without a wait for the device.

        Args:
            values: scalars by name.
            indices: the micro batch's samples.
        """
        if not self._names:
            self._names = list(values)
            self._totals = torch.zeros(2, len(values), device=self._device)
        found = torch.stack([v.detach().float().reshape(()) for v in values.values()])
        finite = torch.isfinite(found)
        self._totals += torch.stack([torch.where(finite, found, 0.0), (~finite).float()])
        self._finite.append((finite[0], indices))

    def reduce(self, notice: Notice, *, saving: bool) -> None:
        """Sum over ranks, and find the largest notice and whether any is saving; collective."""
        flags = [[notice >= Notice.SAVE, notice >= Notice.STOP], [saving, False]]
        counted = torch.tensor(flags, dtype=torch.float32, device=self._device)
        totals = torch.cat([self._totals, counted], dim=1)
        dist.all_reduce(totals)
        (*self._sums, save, stop), (*self._not_finite, any_saving, _) = totals.tolist()
        self.notice = Notice.STOP if stop else Notice.SAVE if save else Notice.NONE
        self.saving = bool(any_saving)

    @property
    def not_finite(self) -> list[str]:
        """Names of the values that were not finite on any rank; empty if the loss was finite."""
        bad = [n for n, count in zip(self._names, self._not_finite, strict=True) if count]
        return bad if "loss" in bad else []

    @property
    def suspects(self) -> list[int]:
        """Samples of this rank's micro batches whose loss is not finite."""
        return [int(i) for finite, indices in self._finite if not finite for i in indices]

    def means(self, count: int) -> dict[str, float]:
        """Mean over micro batches and ranks."""
        return {name: total / count for name, total in zip(self._names, self._sums, strict=True)}


def _refuse_update(step: int, suspects: list[int], names: list[str]) -> None:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, suspects)
    samples = sorted({index for share in everyone for index in share})
    shown = ", ".join(map(str, samples[:8])) + (", …" if len(samples) > 8 else "")
    terms = [name for name in names if name != "loss"]
    where = f" ({', '.join(terms)})" if terms else ""
    error = NonFiniteLossError(
        f"the loss{where} is not finite at step {step + 1}, in the batches of samples {shown}; "
        "the weights are those of the step before",
        hint="lower optim.base_lr, set optim.clip_grad_norm=1.0, or engine.precision=fp32; "
        "with a changed recipe use --fresh or another --name",
    )
    error.on_every_rank = True
    raise error


def _stopped(step: int, steps: int) -> StoppedError:
    error = StoppedError(
        f"stopped as asked after step {step} of {steps}, which has a checkpoint",
        hint="the same command goes on from there",
    )
    error.on_every_rank = True
    return error


def _plain_grad_norm(engine: Engine) -> Tensor | None:
    """Global gradient norm where no ZeRO optimiser computes it (stage 0)."""
    if engine.zero_optimization() or hasattr(engine.optimizer, "_global_grad_norm"):
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def _shown_batch(plan: Plan, source: Source, inputs: Inputs) -> Batch:
    """The first samples of the run; the same ones are drawn each time, to show progress."""
    order = training_order(source, plan.recipe)
    count = min(plan.recipe.logging.num_pictures, len(source))
    samples = Samples(source, plan.recipe, inputs)
    places = zip(*order.take(0, count), strict=True)
    return collate([samples[Place(int(epoch), int(index))] for epoch, index in places])


def _show(
    engine: Engine,
    plan: Plan,
    batch: Batch,
    inputs: Inputs,
    step: int,
    device: torch.device,
    observer: Observer,
) -> None:
    arguments = arguments_of(batch, inputs, plan.recipe, device)
    torch.manual_seed(_device_seed(plan.recipe.seed, step, dist.get_rank()))
    engine.eval()
    with torch.no_grad():
        panels = engine.module.panels(arguments["images"], engine(**arguments))
    engine.train()
    if dist.get_rank() == 0:
        observer.pictures(step, panels)


def _score(
    engine: Engine, probe: Probe, step: int, fixed: Mapping[str, Tensor], device: torch.device
) -> dict[str, float]:
    """Score the encoder on rank 0, which the others wait for; collective.

    Rank 0 tells them now and then that it is at work, so that no collective runs out of time.
    """
    state = full_state(engine, fixed, probe.wants)
    done = torch.zeros(1, device=device)
    figures: dict[str, float] = {}
    if dist.get_rank() == 0:
        figures = probe(step, state, alive=lambda: dist.broadcast(done, src=0))
        done.fill_(1)
        dist.broadcast(done, src=0)
    while not done.item():
        dist.broadcast(done, src=0)
    return figures


def _row(plan: Plan, step: int, result: _StepResult, speed: Speed, device: torch.device) -> Row:
    images_per_s, data_wait = speed.take()
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device) / 2**20
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {
        "step": step,
        "samples": step * plan.global_batch,
        "epoch": step * plan.global_batch / plan.data.num_samples,
        "loss": result.loss,
        "lr": learning_rate(plan, step - 1),
        "grad_norm": result.grad_norm,
        **result.figures,
        "images_per_s": round(images_per_s, 2),
        "data_wait": round(data_wait, 4),
        "memory_mib": round(memory, 1),
        "time": round(time.time(), 3),
    }


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _device_seed(seed: int, step: int, rank: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
