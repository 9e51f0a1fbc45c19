from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimray.trainers.bundles import BundleCard, save_bundle
from mimray.trainers.config.evaluation.knn import KnnConfig
from mimray.trainers.data.hold_out import HoldOut
from mimray.trainers.data.sources import open_source
from mimray.trainers.errors import DataError
from mimray.trainers.evaluation.features.encoders import EncoderRef, untrained
from mimray.trainers.evaluation.features.pooled import labelled_features
from mimray.trainers.evaluation.probes.knn import evaluate, knn, nearest, predict
from mimray.trainers.evaluation.results import result_of
from mimray.trainers.evaluation.score import Setting


def clusters(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.choice([3, 7, 8, 40], size=count)
    centres = np.random.default_rng(0).normal(size=(41, 12))
    points = centres[labels] + 1.6 * rng.normal(size=(count, 12))
    return (points * rng.uniform(0.1, 9, size=(count, 1))).astype(np.float32), labels


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_predict__equals_scikit_learn(temperature: float):
    from sklearn.neighbors import KNeighborsClassifier

    train_x, train_y = clusters(300, 1)
    val_x, val_y = clusters(1500, 2)

    ours = predict(train_x, train_y, val_x, ks=(1, 5, 20, 200), temperature=temperature)

    for k, labels in ours.items():
        theirs = KNeighborsClassifier(
            k, metric="cosine", weights=lambda d: np.exp((1 - d) / temperature)
        ).fit(train_x, train_y)
        np.testing.assert_array_equal(labels, theirs.predict(val_x), err_msg=str(k))
    assert 0.5 < (ours[20] == val_y).mean() < 1


def test_knn__scores_every_k_at_once():
    train_x, train_y = clusters(300, 1)
    val_x, val_y = clusters(64, 2)

    score = knn(train_x, train_y, val_x, val_y)

    alone = predict(train_x, train_y, val_x, ks=(20,))
    assert sorted(score.accuracy) == [1, 5, 10, 20, 200]
    assert (score.k, score.num_train, score.num_val) == (20, 300, 64)
    assert score.headline == score.accuracy[20] == (alone[20] == val_y).mean()


def test_knn__few_training_pictures_cut_k():
    train_x, train_y = clusters(8, 1)

    score = knn(train_x, train_y, train_x, train_y)

    assert (score.k, sorted(score.accuracy)) == (8, [1, 5, 8])
    assert score.accuracy[1] == 1.0


def test_predict__nearer_neighbours_count_for_more():
    train_x = np.array([[1, 0], [0, 1], [0.1, 1]], dtype=np.float32)
    train_y = np.array([0, 1, 1])

    one_near = predict(train_x, train_y, np.array([[1, 0.1]]), ks=(3,), temperature=0.07)
    all_alike = predict(train_x, train_y, np.array([[1, 0.1]]), ks=(3,), temperature=100)

    assert (one_near[3].item(), all_alike[3].item()) == (0, 1)


def test_predict__one_neighbour_needs_no_weights():
    from sklearn.neighbors import KNeighborsClassifier

    train_x, train_y = clusters(300, 1)
    val_x, _ = clusters(500, 2)

    theirs = KNeighborsClassifier(1, metric="cosine").fit(train_x, train_y)

    np.testing.assert_array_equal(
        predict(train_x, train_y, val_x, ks=(1,))[1], theirs.predict(val_x)
    )
    (near,) = theirs.kneighbors(val_x, 5, return_distance=False)[None]
    np.testing.assert_array_equal(nearest(train_x, val_x, 5), near)


def test_evaluate__scores_a_dataset_and_shows_neighbours(
    ref: EncoderRef, colours: Path, setting: Callable[..., Setting]
):
    score = evaluate(ref, setting(colours), KnnConfig(k=5))

    train, _ = labelled_features(ref, open_source(str(colours)), setting(colours), "mean", phase="")
    val, _ = labelled_features(
        ref, open_source(str(colours), split="val"), setting(colours), "mean", phase=""
    )
    wanted = knn(train.x, train.y, val.x, val.y, k=5)
    assert (score.metric, score.headline) == ("accuracy", wanted.headline)
    assert score.headline > 0.9
    assert (score.num_train, score.num_val) == (60, 18)
    assert score.metrics["accuracy_by_k"] == {str(k): a for k, a in wanted.accuracy.items()}
    assert set(score.metrics["per_class_accuracy"]) == {"blue", "green", "red"}
    assert score.notes == ()
    assert score == evaluate(ref, setting(colours), KnnConfig(k=5))
    sheet = Image.open(io.BytesIO(score.pictures["knn.png"]))
    # A frame is green where the neighbour is of the query's class.
    greens = (np.asarray(sheet) == (46, 160, 67)).all(axis=2)
    assert greens.any()


def test_evaluate__names_the_view_in_the_score(
    ref: EncoderRef, colours: Path, setting: Callable[..., Setting]
):
    whole = evaluate(ref, setting(colours), KnnConfig())
    cropped = evaluate(ref, setting(colours), KnnConfig(view="center_crop"))

    assert (whole.metric, cropped.metric) == ("accuracy", "accuracy_center_crop")
    assert "accuracy" not in cropped.metrics
    assert cropped.metrics["accuracy_center_crop"] == cropped.headline
    assert whole.metrics["view"] == "whole, resized to 16x24, bicubic"
    assert cropped.metrics["view"] == "resized to cover 18x27, bicubic; centre crop of 16x24"
    views = [
        labelled_features(
            ref, open_source(str(colours)), setting(colours), "mean", phase="", view=v
        )
        for v in ("whole", "center_crop")
    ]
    assert np.abs(views[0][0].x - views[1][0].x).max() > 1e-3


def test_evaluate__a_class_without_validation_pictures_is_told_and_not_averaged(
    ref: EncoderRef, colours: Path, setting: Callable[..., Setting]
):
    shutil.rmtree(colours / "val/blue")  # the others keep their numbers

    score = evaluate(ref, setting(colours), KnnConfig())

    assert score.metrics["per_class_accuracy"]["blue"] is None
    assert score.headline > 0.9
    assert score.notes == ("no picture of blue to score on",)


def test_evaluate__refuses_data_it_cannot_score(
    ref: EncoderRef, colours: Path, setting: Callable[..., Setting], tmp_path: Path
):
    with pytest.raises(DataError, match="has no labels"):
        evaluate(ref, setting(colours, val=str(colours / "val/red")), KnnConfig())
    (colours / "val/red").rename(colours / "val/Red")
    with pytest.raises(DataError, match="has class 'Red', which .*colours calls 'red'"):
        evaluate(ref, setting(colours), KnnConfig())
    for old, new in (("Red", "pink"), ("green", "lime"), ("blue", "navy")):
        (colours / "val" / old).rename(colours / "val" / new)
    with pytest.raises(DataError, match=r"none of the classes .*\(lime; navy; pink\) is one of"):
        evaluate(ref, setting(colours), KnnConfig())
    shutil.rmtree(colours / "val")
    (colours / "val").mkdir()
    with pytest.raises(DataError, match="no picture"):
        evaluate(ref, setting(colours, val=str(colours / "val")), KnnConfig())


def test_evaluate__prefers_validation_to_test(
    ref: EncoderRef, colours: Path, setting: Callable[..., Setting]
):
    shutil.copytree(colours / "train", colours / "test")

    assert evaluate(ref, setting(colours), KnnConfig()).num_val == 18


def test_evaluate__a_class_that_cannot_be_learnt_counts_as_wrong_and_is_said(
    ref: EncoderRef, colours: Path, setting: Callable[..., Setting]
):
    (colours / "val/red").rename(colours / "val/pink")

    score = evaluate(ref, setting(colours), KnnConfig())

    assert score.headline == pytest.approx(2 / 3)
    assert score.metrics["per_class_accuracy"] == {"blue": 1, "green": 1, "red": None, "pink": 0}
    said = "6 of 18 pictures to score on count as wrong: .*classes from .pink."
    assert any(re.match(said, note) for note in score.notes)


def test_evaluate__holds_pictures_out_where_there_is_no_split(
    ref: EncoderRef, card: BundleCard, colours: Path, setting: Callable[..., Setting]
):
    data = colours / "train"
    score = evaluate(ref, setting(data), KnnConfig())
    again = evaluate(ref, setting(data, seed=1), KnnConfig())
    other = evaluate(ref, setting(data, hold_out=HoldOut(0.2, seed=1)), KnnConfig())

    assert (score.num_train, score.num_val) == (48, 12)
    assert score.hold_out == HoldOut(0.2, 0)
    assert re.match("the data has no split .*: 12 of its 60 pictures are held out", score.notes[0])
    assert score.val_fingerprint == again.val_fingerprint != other.val_fingerprint
    assert len(score.notes) == 1, "this encoder was trained on nothing"
    assert result_of(score, {})["hold_out"] == {"share": 0.2, "seed": 0}
    with_split = evaluate(ref, setting(colours), KnnConfig())
    assert with_split.hold_out is None


def test_evaluate__says_that_an_encoder_has_seen_what_is_held_out(
    card: BundleCard, colours: Path, setting: Callable[..., Setting], tmp_path: Path
):
    data = colours / "train"
    seen = card.model_copy(
        update={"data_fingerprint": open_source(str(data), with_labels=False).facts.fingerprint}
    )
    save_bundle(tmp_path / "seen", seen, untrained(card).encoder.state_dict())

    score = evaluate(EncoderRef.parse(str(tmp_path / "seen")), setting(data), KnnConfig())

    assert "the encoder was trained on the pictures held out" in score.notes[1]
    assert "data.val_share=0.2" in score.notes[1]
