"""The score of a task, and the setting that every task is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mimray.trainers.data.hold_out import HoldOut

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
    notes: tuple[str, ...] = ()
    pictures: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    hold_out: HoldOut | None = None


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
