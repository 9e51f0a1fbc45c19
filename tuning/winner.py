"""The winner of a sweep, scored once on pictures that took no part in its choice.

The best of many scores is partly the luckiest of them, so that the score a trial was chosen by is
too high on average.
"""

from __future__ import annotations

from typing import Any

import ray

from mimray.trainers.bundles import CARD
from mimray.trainers.errors import MimrayError
from mimray.tuning.record import FinalScore, SweepRecord, trial_dir
from mimray.tuning.score import Scored, has_report, report_place, score_bundle
from mimray.tuning.trial import LaunchContext


def report_winner(context: LaunchContext, record: SweepRecord) -> None:
    """Score the best trial on the pictures kept from the choice, unless that is done.

    What keeps it from being scored becomes a warning of the sweep; a later launch tries again.

    Args:
        context: the values that all trials share.
        record: the sweep's record after the search and the repeats.
    """
    best, config = record.best, context.plan.config.score
    if best is None or not has_report(config):
        return
    if record.reported is not None:
        return
    bundle = trial_dir(context.plan.directory, best.number) / "bundle"
    if not bundle.exists(CARD):
        context.recorder.note.remote(f"the winner has no score of its own: no bundle at {bundle}")
        return
    capacity = context.capacity
    work = ray.remote(_scored).options(
        num_cpus=capacity.cpus, num_gpus=min(1.0, capacity.gpus), max_retries=2
    )
    try:
        found: Scored = ray.get(work.remote(context, bundle.uri, record.chosen_by(best)))
    except ray.exceptions.RayTaskError as error:
        if not isinstance(error.cause, MimrayError):
            raise
        context.recorder.note.remote(f"the winner has no score of its own: {error.cause}")
        return
    final = FinalScore(
        trial=best.number,
        rungs=len(best.rungs),
        headline=found.score,
        standard_error=found.standard_error,
        num_val=found.num_pictures,
        place=report_place(config, context.plan.facts.uri),
    )
    ray.get(context.recorder.final.remote(final))


def _scored(context: LaunchContext, bundle: str, chosen_by: dict[str, Any]) -> Scored:
    """Score a bundle in a Ray worker that holds the devices of a trial."""
    import torch

    from mimray.trainers.storage import RunDir

    torch.set_num_threads(context.capacity.cpus)  # Ray sets OMP_NUM_THREADS to 1
    plan = context.plan
    return score_bundle(
        RunDir(bundle),
        plan.config.score,
        plan.facts.uri,
        seed=plan.config.seed,
        device="cuda" if context.capacity.gpus else "cpu",
        command=plan.command,
        part="report",
        chosen_by=chosen_by,
    )
