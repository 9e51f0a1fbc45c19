"""`mimray pretrain`: a recipe on a dataset, trained on the cluster."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mimray.service.commands.places import with_places
from mimray.service.terminal.console import say, warn
from mimray.service.terminal.progress import Progress, duration, show_training
from mimray.trainers.cluster import connected

if TYPE_CHECKING:
    from mimray.trainers.config.run import Plan
    from mimray.trainers.engine.metrics import ProbeCurve
    from mimray.trainers.storage import RunDir


def run_pretrain(
    recipe: str,
    *,
    data: str,
    name: str,
    storage: str,
    steps: int | None,
    overrides: Sequence[str],
    fresh: bool,
    command: str,
) -> dict[str, Any]:
    """Check everything that can be checked, then start workers and train.

    Args:
        recipe: a shipped recipe's name, or the path of one.
        data: the dataset's path or URI.
        name: the run's name.
        storage: the directory or URI of all runs.
        steps: the length of the run, in updates; the recipe's by default.
        overrides: assignments `a.b=value` to keys of the recipe.
        fresh: delete what an earlier run of this name left.
        command: the command line, for the record.

    Returns:
        What `--json` prints.

    Raises:
        MimrayError: a mistake of the user's, before a worker starts where possible.
    """
    from mimray.trainers.config.advice import advice
    from mimray.trainers.config.recipes import load_recipe

    checked = with_places(load_recipe(recipe, overrides, steps), storage)

    from mimray.trainers.data.account import Account
    from mimray.trainers.engine.metrics import probe_curve, read_metrics
    from mimray.trainers.launch import Job, begins_with, finished, prepare, pretrain

    job = Job(checked, data, name, storage, fresh, command)
    account, notes = Account(), list[str]()
    plan = prepare(job, account, notes)
    say(
        f"{job.run}: {recipe}, {plan.data.num_samples} pictures, {plan.steps} steps "
        f"({plan.steps / plan.steps_per_epoch:.2f} epochs), peak lr {plan.lr:.3g}"
    )
    say(plan.batch_arithmetic)
    for line in longer_lines(plan):
        say(line)
    for line in begins_with(job, plan):
        say(line)
    for line in account.short_lines():
        say(f"{data}: {line}")
    for note in notes:
        say(note)
    for warning in advice(plan):
        warn(warning)
    if "/_ray_pkg_" in job.run.uri:  # where `ray job submit --working-dir` unpacks
        say(
            "warning: this --storage lies in the job's own copy of the code, which Ray deletes; "
            "give an absolute path that every node sees, or s3://…"
        )
    outcome = finished(job, plan)
    already_done = outcome is not None
    if outcome is None:
        began = time.monotonic()
        with connected(), Progress(elapsed=True) as progress:
            outcome = pretrain(job, plan, show_training(progress, plan.steps))
        _draw_loss(job.run)
        say(f"trained in {duration(time.monotonic() - began)}")
    else:
        say(f"{job.run} is finished already; --fresh starts over")
    last = outcome.last
    say(f"loss {last['loss']:.4f} after {last['step']} steps")
    probe = probe_curve(read_metrics(job.run))
    if probe is not None:
        text = _probe_text(probe)
        _draw_probe(job.run, probe, text)
        say(f"{text}; the curve in {job.run / 'probe.png'}")
    say(f"bundle in {job.run / 'bundle'}")
    return {
        "run": str(job.run),
        "bundle": str(job.run / "bundle"),
        "plan_hash": plan.hash,
        "global_batch": plan.global_batch,
        "already_done": already_done,
        "probe": None if probe is None else _summary(probe),
        **last,
    }


def _summary(probe: ProbeCurve) -> dict[str, Any]:
    return {
        "figure": probe.figure,
        "last": probe.last.value,
        "last_standard_error": probe.last.standard_error,
        "last_step": probe.last.step,
        "best": probe.best.value,
        "best_standard_error": probe.best.standard_error,
        "best_step": probe.best.step,
        "curve": [list(point) for point in probe.points],
    }


def _probe_text(probe: ProbeCurve) -> str:
    from mimray.trainers.evaluation.uncertainty import figure_text

    newest, best = (figure_text(p.value, p.standard_error) for p in (probe.last, probe.best))
    return (
        f"{probe.figure} {newest} at step {probe.last.step}, best {best} at step {probe.best.step}"
    )


def _draw_probe(run: RunDir, probe: ProbeCurve, title: str) -> None:
    from mimray.trainers.pictures import probe_chart

    with TemporaryDirectory(prefix="mimray-") as scratch:
        file = Path(scratch) / "probe.png"
        probe_chart(probe.points, title, file)
        run.write("probe.png", file.read_bytes())


def longer_lines(plan: Plan) -> list[str]:
    """The new schedule of a run that was made longer than planned, in sentences for people."""
    if not plan.lengths:
        return []
    from mimray.trainers.engine.schedule import learning_rate

    was = ", ".join(str(length.steps) for length in plan.lengths)
    last = plan.lengths[-1]
    rates = ", ".join(
        f"{learning_rate(plan, step):.3g} at step {step}" for step in (last.until, plan.steps - 1)
    )
    return [
        f"planned for {was} steps before; from step {last.until} on the schedule is that of "
        f"{plan.steps} steps: lr {rates}; the warm-up stays {plan.warmup_steps} steps"
    ]


def _draw_loss(run: RunDir) -> None:
    from mimray.trainers.engine.metrics import read_metrics
    from mimray.trainers.pictures import loss_chart

    with TemporaryDirectory(prefix="mimray-") as scratch:
        file = Path(scratch) / "loss.png"
        loss_chart(read_metrics(run), file)
        run.write("loss.png", file.read_bytes())
