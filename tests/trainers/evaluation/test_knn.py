from __future__ import annotations

import numpy as np
import pytest

from trainers.evaluation.knn import knn, predict


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
