"""Pictures held out to score on, where a dataset has no split for that."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mimray.trainers.data.discover import available_splits
from mimray.trainers.data.splits import preferred_validation


@dataclass(frozen=True)
class HoldOut:
    """The rule by which pictures are held out.

    The seed is apart from a command's own, so that repetitions under other seeds, and other
    commands, score the same pictures.

    Attributes:
        share: share of each class, in (0, 1); of all pictures where these have several classes.
        seed: seed of the choice.
    """

    share: float = 0.2
    seed: int = 0


def validation_split(uri: str) -> str | None:
    """The split of a dataset to score on, or None where it has no split but the training's."""
    splits = available_splits(uri)
    # A lone split is what is learnt from.
    return preferred_validation(splits) if len(splits) > 1 else None


def choose(
    identities: Sequence[str], rule: HoldOut, classes: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Choose pictures to hold out: of each class those with the smallest digests.

    A class of two pictures or more has at least one on either side; one of a single picture, and
    pictures without a class, are learnt from. Identities that are equal keep their order.

    Args:
        identities: a text a picture that tells it from others, wherever the data lies.
        rule: share and seed.
        classes: int64 [N], -1 for pictures without a class; None for one class of all.

    Returns:
        Indices of the pictures to learn from and of those held out, both int64 and ascending.
    """
    digests = np.array(
        [hashlib.sha256(f"{rule.seed} {identity}".encode()).digest()[:8] for identity in identities]
    ).view(">u8")
    if classes is None:
        classes = np.zeros(len(identities), dtype=np.int64)
    order = np.lexsort((digests, classes))
    ordered = classes[order]
    first = np.searchsorted(ordered, ordered, side="left")
    counts = np.searchsorted(ordered, ordered, side="right") - first
    wanted = np.clip(np.round(rule.share * counts), 1, counts - 1)
    held = np.zeros(len(identities), dtype=bool)
    held[order] = (np.arange(len(order)) - first < wanted) & (ordered >= 0)
    return np.flatnonzero(~held), np.flatnonzero(held)


def hold_out_note(num_held: int, num_pictures: int, rule: HoldOut, *, by_class: bool) -> str:
    """A sentence that says which pictures are held out, for people.

    Args:
        num_held: pictures held out.
        num_pictures: pictures of the dataset.
        rule: share and seed.
        by_class: True if the share is one of each class.
    """
    share = f"{rule.share:.0%} of each class" if by_class else f"{rule.share:.0%}"
    return (
        f"the data has no split to score on: {num_held} of its {num_pictures} pictures are held "
        f"out ({share}, seed {rule.seed}), the same in every command; --val-share chooses another "
        "share"
    )
