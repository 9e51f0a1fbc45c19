from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimray.trainers.config.evaluation.rankme import RankMeConfig
from mimray.trainers.data.sources import open_source
from mimray.trainers.errors import ConfigError, EmptyDatasetError
from mimray.trainers.evaluation.features.encoders import EncoderRef
from mimray.trainers.evaluation.features.pooled import labelled_features, pooled_features
from mimray.trainers.evaluation.probes.rankme import (
    PROXY,
    effective_rank,
    evaluate,
    singular_values,
)
from mimray.trainers.evaluation.score import Setting

MakeSetting = Callable[..., Setting]


def reference(x: np.ndarray) -> float:
    """Eq. 1 of the paper, term by term, by NumPy's LAPACK."""
    sigma = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    total = 0.0
    for value in sigma:
        p = value / np.abs(sigma).sum() + 1e-7
        total -= p * np.log(p)
    return float(np.exp(total))


@pytest.fixture
def unlabelled(tmp_path: Path) -> Path:
    """Sixty smooth pictures in one folder."""
    folder = tmp_path / "unlabelled"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(60):
        pixels = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((48, 32), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number:02}.png")
    return folder


@pytest.mark.parametrize(("rows", "width"), [(300, 20), (20, 300), (64, 64)])
@pytest.mark.parametrize("decay", [0.0, 0.2, 2.0])
def test_effective_rank__equals_the_formula(rows: int, width: int, decay: float):
    x = np.random.default_rng(1).normal(size=(rows, width)) * np.exp(-decay * np.arange(width))
    x = x.astype(np.float32)

    ours = effective_rank(singular_values(x))

    np.testing.assert_allclose(ours, reference(x), rtol=1e-9)
    assert 1 <= ours <= min(rows, width) + 1e-3


@pytest.mark.parametrize("rank", [1, 2, 7, 32])
def test_effective_rank__orthogonal_directions_of_one_length_are_counted(rank: int):
    rng = np.random.default_rng(2)
    left = np.linalg.qr(rng.normal(size=(200, rank)))[0]
    right = np.linalg.qr(rng.normal(size=(32, rank)))[0]

    assert effective_rank(singular_values(5 * left @ right.T)) == pytest.approx(rank, rel=1e-4)


def test_effective_rank__of_collapsed_features_is_one():
    same = np.ones((50, 1)) @ np.random.default_rng(3).normal(size=(1, 16))

    assert effective_rank(singular_values(same)) == pytest.approx(1, abs=1e-4)
    assert effective_rank(singular_values(np.zeros((50, 16)))) == pytest.approx(1, abs=1e-4)


def test_evaluate__scores_pictures_without_labels(
    ref: EncoderRef, unlabelled: Path, setting: MakeSetting
):
    score = evaluate(ref, setting(unlabelled), RankMeConfig())

    source = open_source(str(unlabelled))
    assert source.labels() is None
    x = pooled_features(ref, source, setting(unlabelled), "mean", phase="").x
    assert x.shape == (60, 16)
    assert score.metric == "RankMe"
    assert score.headline == pytest.approx(reference(x), rel=1e-9)
    assert 1 < score.headline < 16
    assert (score.num_train, score.num_val) == (0, 60)
    assert score.val_fingerprint == source.facts.fingerprint
    assert score.notes == (PROXY,)
    assert score == evaluate(ref, setting(unlabelled), RankMeConfig())
    Image.open(io.BytesIO(score.pictures["rankme.png"])).verify()


def test_evaluate__as_many_pictures_as_asked_for(
    ref: EncoderRef, unlabelled: Path, setting: MakeSetting
):
    few = evaluate(ref, setting(unlabelled), RankMeConfig(limit=10))
    fewer = evaluate(ref, setting(unlabelled, limit=5), RankMeConfig(limit=10))

    assert (few.num_val, fewer.num_val) == (10, 5)
    assert few.notes == (PROXY, "10 pictures bound the rank of features of width 16: give more")
    assert few == evaluate(ref, setting(unlabelled, limit=10), RankMeConfig())


def test_evaluate__prefers_the_validation_split(
    ref: EncoderRef, colours: Path, unlabelled: Path, setting: MakeSetting
):
    own = evaluate(ref, setting(colours), RankMeConfig())
    named = evaluate(ref, setting(colours, val=str(unlabelled)), RankMeConfig())
    # Of labelled pictures the features are those that other tasks score.
    val = open_source(str(colours), split="val")
    x = labelled_features(ref, val, setting(colours), "mean", phase="")[0].x

    assert (own.num_val, named.num_val) == (18, 60)
    assert own.val_fingerprint == val.facts.fingerprint
    assert own.headline == pytest.approx(reference(x), rel=1e-9)


def test_evaluate__pools_as_asked(ref: EncoderRef, unlabelled: Path, setting: MakeSetting):
    both = evaluate(ref, setting(unlabelled), RankMeConfig(pooling="both"))

    assert both.metrics["width"] == 32
    assert both.metrics["pooling"] == "both"


def test_evaluate__refuses_a_class_token_that_is_not_there(setting: MakeSetting, unlabelled: Path):
    swin = EncoderRef.parse("untrained:swin_tiny", image_size=(224, 224))

    with pytest.raises(ConfigError, match="no class token"):
        evaluate(swin, setting(unlabelled), RankMeConfig(pooling="cls"))


def test_evaluate__no_picture_is_left(ref: EncoderRef, tmp_path: Path, setting: MakeSetting):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"\x89PNG but not one")

    with pytest.raises(EmptyDatasetError, match="no picture of .* is left"):
        evaluate(ref, setting(tmp_path / "broken", skip_invalid=True), RankMeConfig())
