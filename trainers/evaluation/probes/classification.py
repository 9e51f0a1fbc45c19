"""Figures of a classifier: over all pictures, and class by class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mimray.trainers.config.evaluation.extract import View
from mimray.trainers.data.transforms import covering_size


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


def accuracy_of(view: View) -> str:
    """Name of the accuracy on a view, so that figures of two views are never taken for one."""
    return "accuracy" if view == "whole" else f"accuracy_{view}"


def described_view(view: View, interpolation: str, image_size: tuple[int, int]) -> str:
    """A view in words, for the result.

    Args:
        view: part of each picture that is shown.
        interpolation: filter of the resize.
        image_size: (height, width) of the input, pixels.
    """
    height, width = image_size
    if view == "whole":
        return f"whole, resized to {height}x{width}, {interpolation}"
    rows, columns = covering_size(image_size, image_size)
    return f"resized to cover {rows}x{columns}, {interpolation}; centre crop of {height}x{width}"


def top_k_accuracy(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """The share of pictures whose class is among the k with the largest scores.

    Args:
        scores: [N, C].
        labels: int64 [N].
        k: number of classes that count, at most C.
    """
    best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    return float((best == labels[:, None]).any(axis=1).mean())
