from __future__ import annotations

import io
import time

import numpy as np
import pytest
from PIL import Image

from mimray.trainers.evaluation.charts import _most_confused, confusion_chart
from mimray.trainers.evaluation.confusion import (
    confusion_counts,
    confusion_matrix,
    confusion_record,
)


def drawn(num_classes: int, count: int = 5000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(num_classes)
    labels = rng.integers(0, num_classes, count)
    predicted = np.where(rng.random(count) < 0.7, labels, rng.integers(0, num_classes, count))
    return labels, predicted


def test_counts__are_the_matrix_without_its_zeros() -> None:
    labels, predicted = drawn(7)
    rows, columns, counts = confusion_counts(labels, predicted)
    matrix = np.zeros((7, 7), dtype=np.int64)
    matrix[rows, columns] = counts
    np.testing.assert_array_equal(matrix, confusion_matrix(labels, predicted, 7))
    assert (np.diff(counts) <= 0).all()


def test_record__of_many_classes_holds_the_pairs_that_occur() -> None:
    labels, predicted = np.array([0, 0, 9999]), np.array([5, 5, 9999])
    names = [str(k) for k in range(10_000)]
    record = confusion_record(labels, predicted, names)
    assert record == {"class_names": names, "true_predicted_count": [[0, 5, 2], [9999, 9999, 1]]}
    few = confusion_record(labels[:2], predicted[:2], names[:6])
    assert few["true_by_predicted"][0] == [0, 0, 0, 0, 0, 2]


@pytest.mark.parametrize("num_classes", [3, 40, 41, 20_000])
def test_chart__is_bounded(num_classes: int) -> None:
    labels, predicted = drawn(num_classes)
    began = time.monotonic()
    names = [f"class number {k} with a rather long name" for k in range(num_classes)]
    picture = Image.open(io.BytesIO(confusion_chart(labels, predicted, names, "a title")))
    assert max(picture.size) < 2000
    assert time.monotonic() - began < 20, "20,000 x 20,000 shares would be 3 GB"


def test_chart__shows_the_classes_that_are_confused_most_often() -> None:
    labels = np.array([7] * 5 + [300] * 9 + [8] * 2 + list(range(1000)))
    predicted = np.array([9] * 5 + [300] * 9 + [7] * 2 + list(range(1000)))
    shown = _most_confused(labels, predicted).tolist()
    assert {7, 8, 9, 300} < set(shown)
    assert len(shown) == 30
