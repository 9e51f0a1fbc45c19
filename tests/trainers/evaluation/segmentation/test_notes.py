"""Notes of a segmentation score."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from mimray.trainers.evaluation.segmentation.metrics import PixelCounts
from mimray.trainers.evaluation.segmentation.scoring import missing_classes


def test_missing_classes__void_that_is_predicted_as_a_class_is_named() -> None:
    data: Any = SimpleNamespace(ignore_index=2, class_names=("a", "b", "void"))
    labels = np.array([[0, 0, 2, 2]])
    found = {}
    for name, predicted in (("void", [0, 2, 2, 2]), ("none", [0, 0, 2, 2])):
        counts = PixelCounts(3)
        counts.add(labels, np.array([predicted]), 2)
        found[name] = missing_classes(counts.confusion, data, data)
    assert [note.rpartition(": ")[2] for note in found["void"]] == ["b", "void"]
    assert "counts as 0 in mIoU" in found["void"][1]
    assert [note.rpartition(": ")[2] for note in found["none"]] == ["b"]
