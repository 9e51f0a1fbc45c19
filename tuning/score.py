"""The objective of a sweep: a probe of a trial's frozen encoder on held-out pictures.

Losses cannot rank trials: at another mask ratio the network solves another task.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mimray.trainers.data.cache import user_cache
from mimray.trainers.data.files import absolute
from mimray.trainers.data.hold_out import HoldOut, validation_split
from mimray.trainers.data.sources import open_source
from mimray.trainers.errors import DataError
from mimray.trainers.evaluation.features.encoders import EncoderRef
from mimray.trainers.evaluation.measure import check_pictures, measure
from mimray.trainers.evaluation.probes.classification import accuracy_of
from mimray.trainers.evaluation.results import add_to_card, result_of, results_folder, write_result
from mimray.trainers.evaluation.score import Part, Setting
from mimray.trainers.evaluation.splits import has_test_beside
from mimray.trainers.evaluation.tasks import TASKS, checked_options
from mimray.trainers.storage import RunDir
from mimray.tuning.config import ScoreConfig

PartName = Literal["choice", "report"]
_METRICS = {"segmentation": "mIoU", "dense-knn": "mIoU", "rankme": "RankMe"}
# Tasks that read a class for each pixel.
_OF_PIXELS = ("segmentation", "dense-knn")
_PROXY = (
    "RankMe, the effective rank of the features, is a stand-in that needs no labels: it follows "
    "what an encoder is worth only loosely, and only between encoders of one width"
)


@dataclass(frozen=True)
class Scored:
    """A score, and the time it took.

    Attributes:
        score: the headline; larger is better.
        metrics: every figure of the task, ready for JSON.
        seconds: seconds of scoring.
        standard_error: the score's standard error over pictures; None where it is not known.
        num_pictures: pictures scored on.
        evidence: the content by picture, as JSON.
    """

    score: float
    metrics: dict[str, Any]
    seconds: float
    standard_error: float | None
    num_pictures: int
    evidence: dict[str, Any] | None


def metric_of(config: ScoreConfig) -> tuple[str, str]:
    """The name of a score, and the reason why it is a proxy, empty where it is none."""
    if config.task in ("knn", "linear"):
        return accuracy_of(config.options.get("view", "whole")), ""
    return _METRICS[config.task], _PROXY if config.task == "rankme" else ""


def check_score(config: ScoreConfig, data: str, seed: int) -> None:
    """Refuse a score that could not be measured, before anything starts.

    Args:
        config: the score's configuration.
        data: the URI of the pictures trained on, scored on where the score names no others.
        seed: the sweep's seed.

    Raises:
        ConfigError: the task has no such option.
        DataError: there are no labels, no held-out pictures, or pictures of `score.report` that
            train an encoder or a probe, or choose the winner.
    """
    options = checked_options(TASKS[config.task], config.options)
    choice = _setting(config, data, seed, "cpu", "choice")
    _, chosen_by = check_pictures(config.task, options, choice, "score")
    if not has_report(config):
        return
    report = _setting(config, data, seed, "cpu", "report")
    learnt, reported = check_pictures(config.task, options, report, "score")
    if config.report is not None:
        trained = frozenset(open_source(data, with_labels=False).places())
        _refuse_shared(config.report, reported, chosen_by, "trials are chosen by them")
        _refuse_shared(config.report, reported, learnt, "the score learns from them")
        _refuse_shared(config.report, reported, trained, "trials train on them")


def _refuse_shared(
    report: str, reported: frozenset[str], seen: frozenset[str], purpose: str
) -> None:
    """Refuse pictures to report on that are not unseen, by their places."""
    shared = reported & seen
    if shared:
        raise DataError(
            f"{len(shared)} of {len(reported)} pictures of score.report={report}, such as "
            f"{min(shared)}, are not unseen: {purpose}",
            hint="name other pictures, or leave score.report out: score.report_share keeps some of "
            "those to score on from the choice",
        )


def without_held_out(tree: dict[str, Any], config: ScoreConfig, data: str) -> dict[str, Any]:
    """A recipe's tree that trains on none of the pictures that its score holds out of its data.

    Tasks on pixels hold pictures out of folders of labels, which need not be those trained on: its
    encoders are trained on all pictures, without their labels.

    Args:
        tree: the recipe, as YAML holds one.
        config: the score's configuration.
        data: the URI of the pictures to train on.
    """
    here = config.data is None or _same_place(config.data, data)
    elsewhere = config.val is not None or not here
    if config.task not in ("knn", "linear") or elsewhere or validation_split(data) is not None:
        return tree
    held_out = {
        "val_share": config.val_share,
        "val_seed": config.val_seed,
        "label": config.label,
    }
    return {**tree, "data": {**tree["data"], **held_out}}


def _same_place(one: str, other: str) -> bool:
    return absolute(one).rstrip("/") == absolute(other).rstrip("/")


def has_report(config: ScoreConfig) -> bool:
    """True if some pictures are kept from the choice."""
    return config.report is not None or config.report_share > 0


def report_place(config: ScoreConfig, data: str) -> str:
    """The pictures that the winner is scored on once, for people.

    Args:
        config: the score's configuration.
        data: the URI of the pictures trained on.
    """
    if config.report is not None:
        return config.report
    scored = config.val or config.data or data
    if config.val is None and config.task not in _OF_PIXELS and has_test_beside(scored):
        return f"the test split of {scored}"
    return f"{config.report_share:.0%} of the pictures of {scored} to score on, drawn by the seed"


def score_bundle(
    bundle: RunDir,
    config: ScoreConfig,
    data: str,
    *,
    seed: int,
    device: str,
    command: str,
    part: PartName = "choice",
    chosen_by: Mapping[str, Any] | None = None,
) -> Scored:
    """Score the encoder of a bundle in this process; results go beside it and onto its card.

    Args:
        bundle: the bundle's directory.
        config: the score's configuration.
        data: the URI of the pictures trained on.
        seed: the sweep's seed.
        device: the device's name in torch.
        command: the command line, for the record.
        part: the pictures that trials are chosen by, or those that the winner is reported on.
        chosen_by: the figure that the winner was chosen by, which goes onto the card beside the
            score.

    Raises:
        DataError: labels or pictures cannot be used.
        NonFiniteLossError: the probe diverged.
    """
    began = time.perf_counter()
    options = checked_options(TASKS[config.task], config.options)
    ref = EncoderRef.parse(bundle.uri)
    setting = _setting(config, data, seed, device, part)
    score = measure(config.task, ref, setting, options)
    seconds = time.perf_counter() - began
    card = ref.card()
    about = {
        "task": config.task,
        "encoder": bundle.uri,
        "command": command,
        "data": setting.data,
        "val": setting.val,
        "label": setting.label,
        "limit": setting.limit,
        "seed": seed,
        "config": options.model_dump(mode="json"),
        "plan_hash": card.plan_hash,
        "weights_sha256": card.weights_sha256,
        "through": None,
        "seconds": round(seconds, 2),
    }
    if has_report(config):
        about["part"] = part
    if chosen_by is not None:
        about["chosen_by"] = dict(chosen_by)
    result = result_of(score, about)
    name = config.task if part == "choice" else f"{config.task}-report"
    write_result(results_folder(bundle), name, result, score)
    add_to_card(bundle, config.task, result)
    return Scored(
        score.headline,
        score.metrics,
        seconds,
        score.standard_error,
        score.num_val,
        result["evidence"],
    )


def _setting(config: ScoreConfig, data: str, seed: int, device: str, part: PartName) -> Setting:
    own = config.report is None and config.report_share > 0
    return Setting(
        data=config.data or data,
        val=config.report if part == "report" and config.report is not None else config.val,
        part=Part(part, config.report_share, seed) if own else None,
        limit=config.limit,
        seed=seed,
        skip_invalid=False,
        device=device,
        folder=user_cache("evaluation") / f"tuning-{uuid.uuid4().hex}",
        progress=_silent,
        label=config.label,
        hold_out=HoldOut(config.val_share, config.val_seed),
    )


def _silent(phase: str, done: int, total: int) -> None:
    """Show nothing: a trial's progress is its rungs."""
