"""`mimray verdict`: an encoder that was adapted, held against its start and an untrained one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class VerdictRequest:
    """The verdict that the user asked for.

    Attributes:
        adapted: the adapted encoder: a bundle, a run or a registered name.
        start: the encoder that the adaptation began from, likewise.
        data: the path or URI of the pictures adapted to; their labels are not read.
        labelled: the path or URI of labelled pictures, with masks, boxes or classes; None for none.
        val: the path or URI of labelled pictures to score on; None takes the split of `labelled`,
            or holds pictures out where it has none.
        retain: the path or URI of a second data set, on which nothing should be lost; None for
            none.
        tasks: the tasks on `labelled`; by default those that its labels allow.
        out: the directory of the verdict; `verdict/` of the adapted run by default.
        limit: the number of pictures taken of each data set, evenly spread.
        seed: the seed of everything drawn.
        overrides: assignments `key=value` to the options of the tasks on `labelled`, and
            `retain.key=value` to those on `retain`.
        label: the column of the labels; `label`, or class folders, by default.
        val_share: the share of each class that is held out; None for the default.
        val_seed: the seed that chooses these.
        skip_invalid: leave out wrong labels and list them.
        command: the command line, for the record.
    """

    adapted: str
    start: str
    data: str
    labelled: str | None = None
    val: str | None = None
    retain: str | None = None
    tasks: tuple[str, ...] = ()
    out: str | None = None
    limit: int | None = None
    seed: int = 0
    overrides: tuple[str, ...] = ()
    label: str | None = None
    val_share: float | None = None
    val_seed: int = 0
    skip_invalid: bool = False
    command: str = ""


def check_verdict(request: VerdictRequest) -> list[str]:
    """Refuse pictures that no verdict could be given on, before anything is computed.

    Neither encoder need be there yet.

    Returns:
        Sentences on what will be measured, for people.

    Raises:
        MimrayError: a data set cannot be opened, lacks labels or pictures, or the retention set is
            the one adapted to.
    """
    raise NotImplementedError


def run_verdict(request: VerdictRequest) -> dict[str, Any]:
    """Score the adapted encoder, its start and an untrained one, and judge the difference.

    What an earlier start of the same verdict has measured is not measured again.

    Returns:
        What `--json` prints: `gain` (True, False, or None where there are no labels to tell by),
        `reasons`, `lines` and `notes` in words, the `figures` with their intervals, `files`.

    Raises:
        MimrayError: a mistake of the user's, before anything heavy starts where possible.
    """
    raise NotImplementedError


def verdict_text(verdict: Mapping[str, Any]) -> str:
    """A verdict for people; its last lines say what was gained."""
    raise NotImplementedError
