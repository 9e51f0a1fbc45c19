"""Figures of a classifier: over all pictures, and class by class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def per_class_accuracy(
    predicted: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
) -> dict[str, float | None]:
    """The share of each class's pictures that were given that class; None where it has none.

    Args:
        predicted: int64 [N].
        labels: int64 [N].
        class_names: names of the classes, by label.
    """
    num_pictures = np.bincount(labels, minlength=len(class_names))
    num_right = np.bincount(labels[predicted == labels], minlength=len(class_names))
    return {
        name: float(right / count) if count else None
        for name, right, count in zip(class_names, num_right, num_pictures, strict=True)
    }


def missing_classes(per_class: dict[str, float | None]) -> tuple[str, ...]:
    """A note that names the classes that could not be scored; none where there are none."""
    missing = [name for name, accuracy in per_class.items() if accuracy is None]
    if not missing:
        return ()
    named = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if missing[10:] else "")
    return (f"no picture of {named} to score on",)


def top_k_accuracy(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """The share of pictures whose class is among the k with the largest scores.

    Args:
        scores: [N, C].
        labels: int64 [N].
        k: number of classes that count, at most C.
    """
    best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    return float((best == labels[:, None]).any(axis=1).mean())
