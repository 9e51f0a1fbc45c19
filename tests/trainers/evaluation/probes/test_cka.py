"""Linear CKA against the formula on whole kernel matrices, and what it must be blind to."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mimray.trainers.evaluation.probes.cka import cka_figure, linear_cka


def by_matrices(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC_1 of Song et al., eq. 5, as it stands there."""

    def hsic(k: np.ndarray, other: np.ndarray) -> float:
        n, one = len(k), np.ones(len(k))
        first = np.trace(k @ other)
        second = (one @ k @ one) * (one @ other @ one) / ((n - 1) * (n - 2))
        third = 2 / (n - 2) * (one @ k @ other @ one)
        return float(first + second - third) / (n * (n - 3))

    k, other = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(other, 0)
    return hsic(k, other) / math.sqrt(hsic(k, k) * hsic(other, other))


@pytest.mark.parametrize(("n", "d", "e"), [(5, 3, 7), (40, 8, 8), (30, 64, 5)])
def test_cka__is_that_of_the_kernel_matrices(n: int, d: int, e: int) -> None:
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, d)) + 3  # a mean, which must not matter
    y = x[:, :1] + rng.normal(size=(n, e))
    assert linear_cka(x, y) == pytest.approx(by_matrices(x, y), rel=1e-9)


def test_cka__sees_through_rotation_and_scale_and_to_nothing_else() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 200)) @ np.diag(0.95 ** np.arange(200))
    turned = np.linalg.qr(rng.normal(size=(200, 200)))[0]
    assert linear_cka(x, 7 * x @ turned + 2) == pytest.approx(1, abs=1e-9)
    others = [linear_cka(x, rng.normal(size=(50, 200))) for _ in range(20)]
    # The biased estimate of unrelated features is near 1 where there are four channels a picture.
    assert abs(np.mean(others)) < 0.05
    assert math.isnan(linear_cka(np.ones((50, 4)), x))


def test_figure__the_jackknife_is_near_the_spread_over_draws() -> None:
    def drawn(seed: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(200, 12)) * 0.8 ** np.arange(12)
        return x, x + rng.normal(size=x.shape) * 0.3

    spread = np.std([linear_cka(*drawn(seed)) for seed in range(200)])
    errors = [cka_figure(*drawn(s), "v", np.arange(200)).standard_error for s in range(10)]
    assert np.mean([error for error in errors if error]) == pytest.approx(spread, rel=0.3)
    assert cka_figure(np.ones((9, 2)), np.ones((9, 2)), "v", np.arange(9)).standard_error is None
