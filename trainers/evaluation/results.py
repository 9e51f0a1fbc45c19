"""Places of a score: `evaluation/` beside the bundle, the bundle's card, MLflow."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mimray.trainers.bundles import CARD, BundleCard
from mimray.trainers.data.files import parent
from mimray.trainers.evaluation.score import Score
from mimray.trainers.storage import RunDir

FOLDER = "evaluation"
_ON_CARD = (
    "metric",
    "headline",
    "standard_error",
    "estimator",
    "num_train",
    "num_val",
    "part",
    "chosen_by",
    "seed",
    "data",
    "data_fingerprint",
    "val_fingerprint",
    "command",
)


def results_folder(bundle: RunDir) -> RunDir:
    """`evaluation/` of the run that a bundle belongs to, or of the bundle where it stands alone."""
    above = RunDir(parent(bundle.uri))
    owner = above if bundle.name == "bundle" and above.exists("plan.json") else bundle
    return owner / FOLDER


def result_of(score: Score, about: Mapping[str, Any]) -> dict[str, Any]:
    """A result as `<task>.json` holds it: the headline, every figure, how to repeat it.

    Args:
        score: score of the task.
        about: task, encoder, command, seed, configuration, seconds and the like.
    """
    return {
        **about,
        "metric": score.metric,
        "headline": score.headline,
        "standard_error": score.standard_error,
        "estimator": score.estimator,
        "metrics": score.metrics,
        "num_train": score.num_train,
        "num_val": score.num_val,
        "data_fingerprint": score.data_fingerprint,
        "val_fingerprint": score.val_fingerprint,
        "hold_out": None if score.hold_out is None else asdict(score.hold_out),
        "notes": list(score.notes),
        "evidence": score.evidence.as_json() if score.evidence is not None else None,
    }


def write_result(folder: RunDir, task: str, result: Mapping[str, Any], score: Score) -> list[str]:
    """Write a result, its pictures and its files.

    Args:
        folder: folder to write to, made where it is missing.
        task: name of the task, and so of the files.
        result: contents of the JSON, from `result_of`.
        score: score whose pictures go beside the JSON, and whose files go into a folder named like
            the task.

    Returns:
        URIs of the pictures.
    """
    folder.create()
    for name, content in score.pictures.items():
        folder.write(name, content)
    if score.files:
        (folder / task).create()
    for name, content in score.files.items():
        (folder / task).write(name, content)
    # The figures last: where they are, the rest is too.
    folder.write(f"{task}.json", json.dumps(result, indent=2).encode() + b"\n")
    return [(folder / name).uri for name in score.pictures]


def card_score(result: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a result that a card holds: the headline, its error and how to repeat it."""
    rule = {"hold_out": result["hold_out"]} if result.get("hold_out") else {}
    return {key: result[key] for key in _ON_CARD if key in result} | rule


def add_to_card(bundle: RunDir, task: str, result: Mapping[str, Any]) -> BundleCard:
    """Put a task's headline on the bundle's card, in place of an earlier one.

    Args:
        bundle: directory of the bundle.
        task: the score's name on the card.
        result: result from `result_of`.

    Returns:
        The card as it is now.
    """
    card = BundleCard.model_validate_json(bundle.read(CARD))
    card = card.model_copy(update={"scores": {**card.scores, task: card_score(result)}})
    bundle.write(CARD, card.model_dump_json(indent=2).encode() + b"\n")
    return card


def track_score(bundle: RunDir, card: BundleCard, task: str, score: Score) -> str:
    """Put a score into MLflow: into the training's run, or into one of the bundle's own.

    Args:
        bundle: directory of the bundle.
        card: card of the bundle.
        task: prefix of the figures' names.
        score: score to track.

    Returns:
        MLflow's id of the run.

    Raises:
        StorageError: MLflow cannot be reached or refuses.
    """
    from mimray.trainers.tracking import Tracker

    run = RunDir(parent(results_folder(bundle).uri))
    tracker = Tracker.open(
        None,
        experiment="mimray",
        run_name=run.name,
        storage=parent(run.uri),
        params={},
        tags={"mimray.run_dir": run.uri},
    )
    figures = dict(_scalars({task: score.metrics}))
    figures |= {f"{task}/{score.metric}": score.headline, f"{task}/num_val": float(score.num_val)}
    if score.standard_error is not None:
        figures[f"{task}/standard_error"] = score.standard_error
    tracker.score(card.step, figures)
    for name, content in score.pictures.items():
        tracker.picture(name.removesuffix(".png"), content, card.step)
    tracker.finish()
    return tracker.run_id


def _scalars(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Finite numbers of a tree by path; lists, such as confusion matrices, are left out."""
    found: list[tuple[str, float]] = []
    for name, value in tree.items():
        # What MLflow does not take in a name.
        key = prefix + "".join(c if c.isalnum() or c in "_-. @" else "_" for c in str(name))
        if isinstance(value, Mapping):
            found += _scalars(value, f"{key}/")
        elif (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        ):
            found.append((key, float(value)))
    return found
