"""The running probe of a training: its encoder is scored every few updates.

What is learnt does not change by it: weights are copied, a second encoder is made of them, and
random numbers of the process are as before. Rank 0 scores, the others wait.
"""

from __future__ import annotations

import logging
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mimray.trainers.bundles import BundleCard, FrozenEncoder
from mimray.trainers.config.run import Plan, Recipe
from mimray.trainers.data.files import absolute
from mimray.trainers.data.hold_out import HoldOut
from mimray.trainers.data.sources import Source
from mimray.trainers.engine.average import chosen_weights
from mimray.trainers.engine.export import card_of, parted
from mimray.trainers.engine.metrics import PROBE, PROBE_SECONDS, STANDARD_ERROR
from mimray.trainers.errors import ConfigError, MimrayError
from mimray.trainers.evaluation.features.encoders import EncoderRef
from mimray.trainers.evaluation.measure import check_pictures, measure
from mimray.trainers.evaluation.results import result_of, write_result
from mimray.trainers.evaluation.score import Progress, Score, Setting
from mimray.trainers.evaluation.tasks import TASKS, checked_options
from mimray.trainers.methods.catalogue import method_class
from mimray.trainers.methods.lora import merged
from mimray.trainers.models import build_encoder
from mimray.trainers.storage import RunDir

logger = logging.getLogger(__name__)

FOLDER = "probe"
"""The folder of a run with the last score of its running probe."""


def placed_probe(recipe: Recipe) -> Recipe:
    """A recipe whose probe names absolute places, since workers have other directories."""
    probe = recipe.evaluation
    places = {"data": probe.data, "val": probe.val}
    found = {key: absolute(place) for key, place in places.items() if place is not None}
    return recipe.model_copy(update={"evaluation": probe.model_copy(update=found)})


def check_probe(recipe: Recipe, training: Source) -> str:
    """Refuse a running probe that could not be measured, before anything starts.

    Args:
        recipe: the run's recipe, with absolute places.
        training: the pictures that are trained on.

    Returns:
        A sentence about the probe and its pictures, for people; empty without a probe.

    Raises:
        ConfigError: there is no such task or option, or the task trains something.
        DataError: there are no such pictures, or they lack labels.
    """
    probe = recipe.evaluation
    if not probe.every_steps:
        return ""
    task = probe.chosen_task
    quick = [name for name, one in TASKS.items() if one.learns_nothing]
    if task not in quick:
        known = "trains a head, for minutes" if task in TASKS else "is no task"
        raise ConfigError(
            f"evaluation.task {task} {known}; those that a run can afford: {', '.join(quick)}",
            hint=f"--set evaluation.task={quick[0]}",
        )
    options = checked_options(TASKS[task], probe.options)
    setting = _setting(recipe, training.facts.uri, "cpu", Path(), _silent)
    learnt, scored = check_pictures(task, options, setting, "evaluation")
    seen = len(scored.intersection(training.places()))
    used = min(len(scored), probe.limit)
    pictures = f"{used:,} pictures of {setting.val or setting.data}"
    known = f", {'all' if seen == len(scored) else f'{seen:,} of {len(scored):,}'} trained on, too"
    by = f" by {min(len(learnt), probe.limit):,} labelled ones" if learnt else ""
    return f"probe every {probe.every_steps} steps: {task} of {pictures}{by}{known if seen else ''}"


@dataclass(frozen=True)
class _EncoderInMemory(EncoderRef):
    """An encoder of which the weights are at hand, and in no bundle yet."""

    description: BundleCard | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)

    def card(self) -> BundleCard:
        assert self.description is not None
        return self.description

    def load(self) -> FrozenEncoder:
        card = self.card()
        encoder = build_encoder(card.encoder, card.image_size, card.channels)
        encoder.load_state_dict(dict(self.state))
        return FrozenEncoder(encoder, card)


class RunningProbe:
    """Scores the encoder of a training; an `engine.loop.Probe`.

    An error is told, and leaves the training as it is: its figures are missing at that step.

    Args:
        plan: the run's plan, with a probe.
        run: the run's directory, which gets the last score.
        device: the worker's device.
        progress: called with the phase, and how much of it is done.
    """

    def __init__(self, plan: Plan, run: RunDir, device: torch.device, progress: Progress) -> None:
        self.every_steps = plan.recipe.evaluation.every_steps
        self._plan, self._run, self._device = plan, run, device
        self._progress = progress
        self._exported = plan.recipe.evaluation.weights == "exported"
        result = method_class(plan.recipe.method.name).result if self._exported else "encoder"
        self._prefixes = (f"{result}.", *([f"ema.{result}."] if self._exported else []))

    def wants(self, name: str) -> bool:
        """True for the names of weights that the probe needs."""
        return name.startswith(self._prefixes)

    def __call__(
        self, step: int, state: Mapping[str, Tensor], alive: Callable[[], object]
    ) -> dict[str, float]:
        """Score the encoder; called on rank 0.

        Args:
            step: updates made.
            state: the weights that the probe wants.
            alive: to be called now and then, for ranks that wait.

        Returns:
            Figures for the row of metrics.
        """
        began = time.perf_counter()
        devices = [self._device] if self._device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):
                score, result = self._score(step, state, alive)
        except (MimrayError, torch.OutOfMemoryError) as error:
            reason = str(error).splitlines()[0]
            logger.warning("no score at step %d: %s; the training goes on", step, reason)
            return {}
        finally:
            if devices:
                torch.cuda.empty_cache()
        seconds = time.perf_counter() - began
        task = self._plan.recipe.evaluation.chosen_task
        write_result(self._run / FOLDER, task, {**result, "seconds": round(seconds, 2)}, score)
        name, spread = figure_name(task, score.metric), score.standard_error
        return {
            name: score.headline,
            **({} if spread is None else {f"{name}{STANDARD_ERROR}": spread}),
            PROBE_SECONDS: round(seconds, 3),
        }

    def _score(
        self, step: int, state: Mapping[str, Tensor], alive: Callable[[], object]
    ) -> tuple[Score, dict[str, object]]:
        recipe = self._plan.recipe
        probe = recipe.evaluation
        options = checked_options(TASKS[probe.chosen_task], probe.options)

        def progress(phase: str, done: int, total: int) -> None:
            alive()
            self._progress(phase, done, total)

        with tempfile.TemporaryDirectory(prefix="mimray-") as scratch:
            setting = _setting(
                recipe, self._plan.data.uri, str(self._device), Path(scratch) / "probe", progress
            )
            ref = self._ref(step, state)
            score = measure(probe.chosen_task, ref, setting, options)
        about = {
            "task": probe.chosen_task,
            "step": step,
            "weights": probe.weights,
            "data": setting.data,
            "val": setting.val,
            "label": setting.label,
            "limit": setting.limit,
            "seed": setting.seed,
            "config": options.model_dump(mode="json"),
            "plan_hash": self._plan.hash,
        }
        return score, result_of(score, about)

    def _ref(self, step: int, state: Mapping[str, Tensor]) -> EncoderRef:
        chosen = chosen_weights(state, "average" if self._exported else "raw")
        weights = merged(chosen, self._plan.recipe)
        if self._exported:
            encoder, _ = parted(self._plan, weights)
        else:
            encoder = {name.removeprefix("encoder."): value for name, value in weights.items()}
        card = card_of(self._plan, step=step, name=self._run.name, command="")
        # Features are kept for this one score alone, so that any text tells its weights apart.
        card = card.model_copy(update={"weights_sha256": uuid.uuid4().hex})
        return _EncoderInMemory(f"{self._run.name} at step {step}", description=card, state=encoder)


def _setting(recipe: Recipe, data: str, device: str, folder: Path, progress: Progress) -> Setting:
    probe = recipe.evaluation
    own = probe.data is not None and probe.data.rstrip("/") != data.rstrip("/")
    share, seed = recipe.data.val_share, recipe.data.val_seed
    return Setting(
        data=probe.data or data,
        val=probe.val,
        limit=probe.limit,
        seed=recipe.seed,
        skip_invalid=True,
        device=device,
        folder=folder,
        progress=progress,
        label=probe.label or (None if own else recipe.data.label),
        # Pictures that the training leaves out are those to score on.
        hold_out=HoldOut(share, seed) if share and not own else HoldOut(),
        keep_features=False,
    )


def figure_name(task: str, metric: str) -> str:
    """The name of a probe's figure in a row of metrics, e.g. `probe_knn_accuracy`."""
    name, figure = task.replace("-", "_"), metric.lower()
    return f"{PROBE}{name}" if figure == name else f"{PROBE}{name}_{figure}"


def _silent(phase: str, done: int, total: int) -> None:
    """Show nothing."""
