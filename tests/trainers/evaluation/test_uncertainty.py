"""Standard errors against formulas and simulation, and pairs of scores told apart or not."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy.stats import binomtest

from mimray.trainers.evaluation.probes.rankme import effective_rank, rank_without, singular_values
from mimray.trainers.evaluation.segmentation.metrics import PixelCounts, scores
from mimray.trainers.evaluation.uncertainty import (
    NUM_RESAMPLES,
    Evidence,
    Figure,
    accuracy_error,
    by_bootstrap,
    by_jackknife,
    described,
    difference,
    of_accuracy,
    resamples,
)

NUM = 120


def accuracy(right: np.ndarray, pictures: str = "v") -> Figure:
    evidence = of_accuracy(right, pictures, np.arange(len(right)))
    return Figure(float(right.mean()), evidence.standard_error, evidence.as_json())


def first_right(count: int, start: int = 0) -> np.ndarray:
    places = np.arange(NUM)
    return (places >= start) & (places < start + count)


def test_accuracy__standard_error_is_the_binomial_one_and_never_0() -> None:
    assert accuracy_error(25, NUM) == pytest.approx(math.sqrt(25 / 120 * 95 / 120 / 120))
    assert accuracy_error(0, 4) == pytest.approx(accuracy_error(4, 4))
    assert accuracy_error(4, 4) > 0.1
    assert Evidence("binomial", "p", 1, (True,)).standard_error is None


@pytest.mark.parametrize("count", [1, 7, 8, 9, NUM])
def test_evidence__is_the_same_after_json(count: int) -> None:
    right = np.random.default_rng(count).random(count) < 0.4
    kept = of_accuracy(right, "v", np.arange(count))
    tree = json.loads(json.dumps(kept.as_json()))
    assert len(tree["values"]) <= 4 * (count // 24 + 1)  # a bit a picture, in base64
    found = Evidence.of_json(tree)
    assert found == kept


def test_difference__25_right_of_120_are_not_told_apart_from_29() -> None:
    ours, untrained = accuracy(first_right(25)), accuracy(first_right(29, start=15))
    found = difference(ours, untrained)
    assert found.paired
    assert found.told_apart is False
    assert found.value == pytest.approx(0.2083 - 0.2417, abs=1e-4)
    gained, lost = 15, 19
    expected = math.sqrt(gained + lost - (gained - lost) ** 2 / NUM) / NUM
    assert found.standard_error == pytest.approx(expected)
    assert found.text() == f"-0.0333 ± {expected:.4f}, not told apart"


def test_difference__pairs_tell_apart_what_unlike_pictures_cannot() -> None:
    ours, other = first_right(60), first_right(50)
    paired = difference(accuracy(ours), accuracy(other))
    assert paired.told_apart is True  # 10 against 0
    unlike = difference(accuracy(ours), accuracy(other, pictures="others"))
    assert not unlike.paired
    assert unlike.told_apart is False
    assert unlike.standard_error == pytest.approx(
        math.hypot(accuracy_error(60, NUM), accuracy_error(50, NUM))
    )
    # Five pictures are the fewest that McNemar's test calls no accident at 6 %, six at 3 %.
    for gained in (5, 6):
        found = difference(accuracy(first_right(50 + gained)), accuracy(other))
        assert found.told_apart == (binomtest(gained, gained).pvalue < 0.05) == (gained == 6)


def test_difference__of_earlier_results_is_a_number_without_a_verdict() -> None:
    found = difference(Figure.of({"headline": 0.25}), accuracy(first_right(24)))
    assert (found.standard_error, found.told_apart, found.text()) == (None, None, "+0.0500")
    assert described({"headline": 0.25}) == "0.2500"
    assert described({"headline": 0.25, "num_val": 1200}) == "0.2500 on 1,200 pictures"


def test_bootstrap__agrees_with_the_formula_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(size=400)
    found = by_bootstrap(lambda counts: float(counts @ values / counts.sum()), "v", 400)
    assert found.standard_error == pytest.approx(values.std() / 20, rel=0.25)
    again = by_bootstrap(lambda counts: float(counts @ values / counts.sum()), "v", 400)
    assert found.as_json() == again.as_json()
    assert (resamples(400).sum(axis=1) == 400).all()
    assert len(resamples(400)) == NUM_RESAMPLES


def test_bootstrap__differences_are_paired_by_the_resample() -> None:
    values = np.random.default_rng(1).normal(size=300)

    def figure(shift: float) -> Figure:
        kept = by_bootstrap(lambda c: float(c @ (values + shift) / c.sum()), "v", 300)
        return Figure(float(values.mean() + shift), kept.standard_error, kept.as_json())

    found = difference(figure(0.01), figure(0.0))
    assert found.paired
    assert found.told_apart  # though it is a sixth of either's standard error
    assert figure(0.0).standard_error is not None
    assert figure(0.0).standard_error > 0.04


def test_miou__each_picture_once_is_the_figure_itself() -> None:
    rng = np.random.default_rng(3)
    counted = PixelCounts(4)
    for _ in range(30):
        mask = rng.integers(0, 3, (8, 8))
        mask[0] = 255
        guessed = np.where(rng.random((8, 8)) < 0.6, mask.clip(0, 3), rng.integers(0, 4, (8, 8)))
        counted.add(mask, guessed, 255)
    assert counted.miou(np.ones(30, np.int64)) == scores(counted.confusion, "abcd")["mIoU"]
    error = by_bootstrap(counted.miou, "v", 30).standard_error
    assert error is not None
    assert 0.002 < error < 0.1


@pytest.mark.parametrize("width", [8, 200])
def test_rankme__jackknife_of_the_same_rank(width: int) -> None:
    x = np.random.default_rng(5).normal(size=(100, width)) @ np.diag(0.9 ** np.arange(width))
    nobody = np.zeros(100, bool)
    without = rank_without(x)
    assert without(nobody) == pytest.approx(effective_rank(singular_values(x)), rel=1e-4)
    out = np.arange(100) % 20 == 3
    assert without(out) == pytest.approx(effective_rank(singular_values(x[~out])), rel=1e-4)
    found = by_jackknife(without, "v", np.arange(100))
    assert found is not None
    assert found.standard_error is not None
    spread = [
        effective_rank(
            singular_values(
                np.random.default_rng(seed).normal(size=(100, width))
                @ np.diag(0.9 ** np.arange(width))
            )
        )
        for seed in range(20)
    ]
    assert found.standard_error == pytest.approx(np.std(spread), rel=0.8)
    assert by_jackknife(without, "v", np.arange(4)) is None


def test_jackknife__of_a_mean_is_its_standard_error_however_few_the_pictures() -> None:
    values = np.random.default_rng(2).normal(size=14)
    found = by_jackknife(lambda out: float(values[~out].mean()), "v", np.arange(14))
    assert found is not None
    assert found.standard_error == pytest.approx(values.std(ddof=1) / math.sqrt(14))


def test_bootstrap__of_scores_that_are_all_the_same_gives_no_error() -> None:
    found = [by_bootstrap(lambda counts, v=value: v, "v", 30) for value in (0.0, 0.5)]
    assert [evidence.standard_error for evidence in found] == [None, None]
    one, other = (Figure(e.values[0], e.standard_error, e.as_json()) for e in found)
    assert difference(other, one).told_apart is None


def test_bootstrap__of_scores_that_cannot_be_measured_is_no_evidence() -> None:
    assert by_bootstrap(lambda counts: None, "v", 5) is None
    some = by_bootstrap(lambda counts: None if counts[0] == 0 else 0.5 + counts[0], "v", 5)
    assert some is not None
    assert np.isfinite(some.as_json()["values"]).all()
