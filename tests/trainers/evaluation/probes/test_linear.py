from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError
from safetensors.numpy import load

from mimray.trainers.config.evaluation.linear import LinearConfig
from mimray.trainers.data.sources import open_source
from mimray.trainers.errors import DataError
from mimray.trainers.evaluation.features.encoders import EncoderRef
from mimray.trainers.evaluation.features.pooled import labelled_features
from mimray.trainers.evaluation.probes.classification import (
    missing_classes,
    per_class_accuracy,
    top_k_accuracy,
)
from mimray.trainers.evaluation.probes.linear import evaluate
from mimray.trainers.evaluation.probes.linear_classifiers import logistic, ridge
from mimray.trainers.evaluation.score import Score, Setting

MakeSetting = Callable[..., Setting]
FAST = {"epochs": 90, "batch_size": 16}


def clusters(num_classes: int, count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(num_classes)
    labels = rng.integers(0, num_classes, count)
    x = rng.normal(size=(num_classes, 8))[labels] + rng.normal(size=(count, 8))
    return (4 + 3 * x).astype(np.float32), labels


def standardised(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(axis=0, dtype=float)) / (x.std(axis=0, dtype=float) + 1e-6)


def test_ridge__equals_the_closed_form_and_scikit_learn():
    from sklearn.linear_model import RidgeClassifier

    x, y = clusters(5)
    z = standardised(x)
    targets = np.where(np.arange(5) == y[:, None], 1.0, -1.0)

    for head, alpha in zip(ridge(x, y, 5, (0.1, 30.0)), (0.1, 30.0), strict=True):
        weight = np.linalg.inv(z.T @ z + alpha * np.eye(8)) @ z.T @ targets
        scores = z @ weight + targets.mean(axis=0)
        np.testing.assert_allclose(head.scores(x), scores, atol=1e-5)
        theirs = RidgeClassifier(alpha=alpha).fit(z, y)
        np.testing.assert_allclose(head.scores(x), theirs.decision_function(z), atol=1e-5)


@pytest.mark.parametrize("num_classes", [2, 5])
def test_logistic__equals_scikit_learn_and_knows_absent_classes(num_classes: int):
    from sklearn.linear_model import LogisticRegression

    x, y = clusters(num_classes)
    labels = y + (y >= 1)  # class 1 has no picture
    z = standardised(x)

    heads = logistic(x, labels, num_classes + 1, (0.01, 1.0))

    for head, strength in zip(heads, (0.01, 1.0), strict=True):
        theirs = LogisticRegression(C=strength, max_iter=1000, tol=1e-8).fit(z, labels)
        ours = head.scores(x) - head.scores(x).max(axis=1, keepdims=True)
        chances = np.exp(ours) / np.exp(ours).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(chances[:, theirs.classes_], theirs.predict_proba(z), atol=5e-3)
        assert (chances[:, 1] == 0).all()
        assert head.converged


def test_logistic__of_a_single_class():
    x, _ = clusters(2)

    (head,) = logistic(x, np.full(len(x), 2), 3, (1.0,))

    assert (head.scores(x).argmax(axis=1) == 2).all()


def test_figures__equal_scikit_learn_s():
    from sklearn.metrics import recall_score, top_k_accuracy_score

    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(80, 7)), rng.integers(0, 6, 80)  # class 6 has no picture
    predicted = scores.argmax(axis=1)

    per_class = per_class_accuracy(predicted, labels, "abcdefg")

    recalls = recall_score(labels, predicted, labels=range(6), average=None)
    assert list(per_class.values()) == [*map(pytest.approx, recalls), None]
    assert missing_classes(per_class) == ("no picture of g to score on",)
    wanted = top_k_accuracy_score(labels, scores, k=5, labels=range(7))
    assert top_k_accuracy(scores, labels, 5) == wanted


@pytest.mark.parametrize("solver", ["logistic", "ridge", "lars"])
def test_evaluate__chooses_on_training_pictures_alone_and_repeats(
    solver: str, ref: EncoderRef, colours: Path, setting: MakeSetting
):
    config = LinearConfig(solver=solver, held_out=0.2, **(FAST if solver == "lars" else {}))

    score = evaluate(ref, setting(colours), config)

    assert (score.metric, score.num_train, score.num_val) == ("accuracy", 60, 18)
    assert score.headline == score.metrics["accuracy"] > 0.9
    assert score.metrics["num_held_out"] == 12
    assert score.metrics["top5_accuracy"] is None
    chosen = score.metrics[{"logistic": "C", "ridge": "alpha", "lars": "base_lr"}[solver]]
    shares = score.metrics["held_out_accuracy"]
    assert shares[str(chosen)] == max(shares.values())
    if solver == "lars":
        assert len(score.metrics["accuracy_by_base_lr"]) == len(config.base_lrs)
        assert score.metrics["batch_size"] == 16
    assert score == evaluate(ref, setting(colours), config)
    # The head as it was saved gives the same figure.
    head = load(score.files["head.safetensors"])
    val, _ = labelled_features(
        ref, open_source(str(colours), split="val"), setting(colours), "mean", phase=""
    )
    right = (val.x @ head["weight"].T + head["bias"]).argmax(axis=1) == val.y
    assert right.mean() == score.headline
    # What is chosen does not depend on the pictures scored on.
    shutil.rmtree(colours / "val/blue")
    fewer = evaluate(ref, setting(colours), config)
    assert fewer.metrics["held_out_accuracy"] == shares
    assert fewer.metrics["per_class_accuracy"] == {
        **score.metrics["per_class_accuracy"],
        "blue": None,
    }


def test_evaluate__pooling_and_views(ref: EncoderRef, colours: Path, setting: MakeSetting):
    def width(score: Score) -> int:
        return int(load(score.files["head.safetensors"])["weight"].shape[1])

    both = evaluate(ref, setting(colours), LinearConfig(solver="ridge", pooling="both"))
    views = evaluate(ref, setting(colours), LinearConfig(solver="lars", num_views=2, **FAST))
    whole = evaluate(ref, setting(colours), LinearConfig(solver="lars", **FAST))

    assert (width(both), both.metrics["pooling"]) == (32, "both")
    assert (width(views), views.metrics["num_views"]) == (16, 2)
    assert views.files != whole.files
    assert views.headline > 0.9


def test_evaluate__too_few_pictures_to_hold_any_out(
    ref: EncoderRef, colours: Path, setting: MakeSetting
):
    with pytest.raises(DataError, match="too few to hold out 10%"):
        evaluate(ref, setting(colours, limit=3), LinearConfig())


@pytest.mark.parametrize(
    "wrong", [{"num_views": 2}, {"solver": "lars", "epochs": 5, "warmup_epochs": 5}]
)
def test_config__refuses_what_does_not_go_together(wrong: dict[str, object]):
    with pytest.raises(ValidationError, match="goes with solver=lars|must be fewer than"):
        LinearConfig(**wrong)


def test_evaluate__labels_far_apart_are_the_classes_that_occur(
    ref: EncoderRef, setting: MakeSetting, tmp_path: Path
):
    numbers = [3, 977, 5_219_404]
    for split, count in (("train", 24), ("test", 9)):
        rows = []
        for row in range(count):
            pixels = np.zeros((16, 24, 3), np.uint8)
            pixels[..., row % 3] = 200 + row
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "png")
            rows.append({"image": file.getvalue(), "label": numbers[row % 3]})
        (tmp_path / "ids").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"ids/{split}-00000-of-00001.parquet")

    score = evaluate(ref, setting(tmp_path / "ids"), LinearConfig(solver="ridge"))

    assert score.metrics["per_class_accuracy"] == {"3": 1.0, "977": 1.0, "5219404": 1.0}
    assert load(score.files["head.safetensors"])["weight"].shape[0] == 3
