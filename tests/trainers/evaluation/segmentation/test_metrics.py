from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics import JaccardIndex
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from mimray.trainers.evaluation.confusion import confusion_matrix
from mimray.trainers.evaluation.segmentation.metrics import scores

K, VOID = 6, 255
NAMES = tuple("abcdef")


def _maps(seed: int, absent: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Labels with void, and predictions that are right half of the time."""
    rng = np.random.default_rng(seed)
    classes = [k for k in range(K) if k not in absent]
    labels = rng.choice(classes, (4, 30, 40))
    predicted = np.where(rng.random(labels.shape) < 0.5, labels, rng.choice(classes, labels.shape))
    labels[rng.random(labels.shape) < 0.1] = VOID
    return labels, predicted


def _ours(labels: np.ndarray, predicted: np.ndarray) -> dict[str, object]:
    whole = np.zeros((K, K), np.int64)
    for one, other in zip(labels, predicted, strict=True):
        whole += confusion_matrix(one, other, K, VOID)
    return scores(whole, NAMES)


@pytest.mark.parametrize("seed", range(3))
def test_scores__equal_torchmetrics(seed: int) -> None:
    labels, predicted = _maps(seed)
    found = _ours(labels, predicted)
    y, x = torch.from_numpy(labels), torch.from_numpy(predicted)
    macro = JaccardIndex(task="multiclass", num_classes=K, ignore_index=VOID)
    each = MulticlassJaccardIndex(K, average=None, ignore_index=VOID)
    micro = MulticlassAccuracy(K, average="micro", ignore_index=VOID)
    mean = MulticlassAccuracy(K, average="macro", ignore_index=VOID)
    assert found["mIoU"] == pytest.approx(macro(x, y).item(), abs=1e-6)
    assert list(found["IoU"].values()) == pytest.approx(each(x, y).tolist(), abs=1e-6)  # type: ignore[attr-defined]
    assert found["pixel_accuracy"] == pytest.approx(micro(x, y).item(), abs=1e-6)
    assert found["mean_accuracy"] == pytest.approx(mean(x, y).item(), abs=1e-6)


def test_scores__a_class_neither_there_nor_predicted_is_left_out_as_by_torchmetrics() -> None:
    labels, predicted = _maps(0, absent=(2,))
    found = _ours(labels, predicted)
    macro = MulticlassJaccardIndex(K, average="macro", ignore_index=VOID)
    reference = macro(torch.from_numpy(predicted), torch.from_numpy(labels)).item()
    assert found["IoU"]["c"] is None  # type: ignore[index]
    assert found["mIoU"] == pytest.approx(reference, abs=1e-6)


def _as_mmsegmentation(labels: np.ndarray, predicted: np.ndarray) -> float:
    """mIoU by mmsegmentation's formula, from histograms over the pixels that are not void."""
    known = labels != VOID
    labels, predicted = labels[known], predicted[known]
    bins = np.arange(K + 1)
    intersect = np.histogram(labels[labels == predicted], bins)[0]
    union = np.histogram(labels, bins)[0] + np.histogram(predicted, bins)[0] - intersect
    with np.errstate(invalid="ignore"):
        return float(np.nanmean(intersect / union))


@pytest.mark.parametrize("absent", [(), (2,), (0, 5)])
@pytest.mark.parametrize("predicts_absent", [False, True])
def test_scores__equal_mmsegmentation(absent: tuple[int, ...], predicts_absent: bool) -> None:
    labels, predicted = _maps(1, absent)
    if predicts_absent:
        predicted[0, :10] = 2
    found = _ours(labels, predicted)
    assert found["mIoU"] == pytest.approx(_as_mmsegmentation(labels, predicted), abs=1e-12)


def test_scores__a_class_without_labels_counts_as_0_where_it_is_predicted() -> None:
    labels, predicted = _maps(1, absent=(2,))
    predicted[0, :10] = 2
    found = _ours(labels, predicted)
    each = MulticlassJaccardIndex(K, average=None, ignore_index=VOID)
    reference = each(torch.from_numpy(predicted), torch.from_numpy(labels)).tolist()
    assert reference[2] == found["IoU"]["c"] == 0  # type: ignore[index]
    assert found["accuracy"]["c"] is None  # type: ignore[index]
    assert found["mIoU"] == pytest.approx(np.mean(reference), abs=1e-6)
    others = [value for k, value in enumerate(reference) if k != 2]
    assert found["mIoU_labelled"] == pytest.approx(np.mean(others), abs=1e-6)
    assert found["mIoU"] < found["mIoU_labelled"]  # type: ignore[operator]


def test_confusion__void_is_in_no_count() -> None:
    labels = np.array([[0, VOID, 1], [1, 1, VOID]])
    one = confusion_matrix(labels, np.array([[0, 0, 1], [0, 1, 1]]), 2, VOID)
    np.testing.assert_array_equal(one, [[1, 0], [1, 2]])
    other = confusion_matrix(labels, np.array([[0, 1, 1], [0, 1, 0]]), 2, VOID)
    np.testing.assert_array_equal(one, other)
