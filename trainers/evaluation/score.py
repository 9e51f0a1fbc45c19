"""The score of a task, and the setting that every task is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mimray.trainers.data.hold_out import HoldOut
from mimray.trainers.data.rng import Stream, generator, permutation
from mimray.trainers.errors import DataError
from mimray.trainers.evaluation.uncertainty import ESTIMATORS, Evidence

Progress = Callable[[str, int, int], None]
"""Called with (phase, done, total), e.g. ("features of train", 320, 15000)."""


@dataclass(frozen=True)
class Score:
    """The outcome of one task.

    Attributes:
        metric: name of the headline, e.g. `accuracy`, `mIoU`, `AP`.
        headline: the figure encoders are ranked by; larger is better.
        metrics: every figure, ready for JSON. What could not be measured (a class that the
            validation split lacks) is None, never 0.
        data_fingerprint: fingerprint of the pictures and labels trained on.
        val_fingerprint: fingerprint of those scored on.
        num_train: pictures trained on.
        num_val: pictures scored on.
        evidence: the content by picture, from which the headline's standard error is estimated;
            None where the task has no estimate.
        notes: sentences for people: classes missing, pictures skipped.
        pictures: PNG files to look at, by file name.
        files: other results, by file name, e.g. the trained head.
        hold_out: the rule by which the pictures scored on were held out; None where the data has
            such pictures of its own, or `val` names them.
    """

    metric: str
    headline: float
    metrics: dict[str, Any]
    data_fingerprint: str
    val_fingerprint: str
    num_train: int
    num_val: int
    evidence: Evidence | None = None
    notes: tuple[str, ...] = ()
    pictures: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    hold_out: HoldOut | None = None

    @property
    def standard_error(self) -> float | None:
        """The headline's standard error over pictures; None where it is not known."""
        return self.evidence.standard_error if self.evidence is not None else None

    @property
    def estimator(self) -> str:
        """The estimator of the standard error, for people; empty where there is none."""
        if self.evidence is None or self.standard_error is None:
            return ""
        return ESTIMATORS[self.evidence.estimator]


@dataclass(frozen=True)
class Part:
    """Part of the pictures to score on: one to choose an encoder by, one to report its score on.

    Attributes:
        name: the part wanted.
        report_share: share of the pictures in the part to report on, in (0, 1).
        seed: seed of the draw.
    """

    name: Literal["choice", "report"]
    report_share: float
    seed: int

    def indices(self, num_pictures: int, labels: np.ndarray | None, place: str) -> np.ndarray:
        """The pictures of the part, int64, ascending; each class is parted alike.

        Args:
            num_pictures: number of pictures to part, N.
            labels: int64 [N], classes; None where there are none.
            place: the pictures' URI, for the error.

        Raises:
            DataError: there are too few pictures for two parts.
        """
        order = permutation(generator(self.seed, Stream.PART, 0), num_pictures)
        if labels is not None:
            order = order[np.argsort(labels[order], kind="stable")]
        # The share of each stretch of the order, and so of each class, up to one picture.
        before = np.floor(np.arange(num_pictures + 1) * self.report_share + 1e-9)
        reported = np.diff(before) > 0
        if not reported.any() or reported.all():
            raise DataError(
                f"{num_pictures} pictures of {place} are too few to keep {self.report_share:.0%} "
                "of them from the choice",
                hint="score.report=PICTURES has the others' place; score.report_share=0 reports "
                "the score that trials were chosen by",
            )
        chosen: np.ndarray = np.sort(order[reported if self.name == "report" else ~reported])
        return chosen


@dataclass(frozen=True)
class Setting:
    """Setting of a task, beside its own options.

    Attributes:
        data: labelled pictures to learn from.
        val: labelled pictures to score on; None takes DATA's own validation or test split, or
            holds some out.
        limit: pictures of each, evenly spread; None for all.
        seed: seed of everything that is drawn.
        skip_invalid: True leaves out what is labelled wrong (an object, or the whole picture where
            it is about that) and lists it; False refuses it.
        device: `cpu`, `cuda`, …, as torch names it.
        folder: folder of the state that a task goes on from after a kill.
        progress: called with the phase, and how much of it is done.
        command: the command line, for the record.
        label: column of the labels; None for `label`, or class folders.
        hold_out: the rule by which pictures are held out where DATA has no split to score on.
        part: part of the pictures to score on; None for all.
        keep_features: True keeps features in the user's cache, False for this score alone.
    """

    data: str
    val: str | None
    limit: int | None
    seed: int
    skip_invalid: bool
    device: str
    folder: Path
    progress: Progress
    command: str = ""
    label: str | None = None
    hold_out: HoldOut = HoldOut()
    part: Part | None = None
    keep_features: bool = True
