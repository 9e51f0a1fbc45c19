"""Linear classifiers on fixed vectors: ridge and logistic regression."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# A feature that never varies is left at zero instead of being divided by zero.
_EPS = 1e-6
_MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class LinearClassifier:
    """Scores of classes, x @ weight.T + bias; whatever standardised x is folded in.

    Attributes:
        weight: float32 [C, D].
        bias: float32 [C].
        converged: True if the solver came to an end by itself.
    """

    weight: np.ndarray
    bias: np.ndarray
    converged: bool = True

    def scores(self, x: np.ndarray) -> np.ndarray:
        """Float32 [N, C] of x [N, D]."""
        scores: np.ndarray = x @ self.weight.T + self.bias
        return scores

    def accuracy(self, x: np.ndarray, y: np.ndarray) -> float:
        """The share of x [N, D] whose best score is that of its class y [N]."""
        return float((self.scores(x).argmax(axis=1) == y).mean())


def folded(
    weight: np.ndarray,
    bias: np.ndarray,
    mean: np.ndarray,
    scale: np.ndarray,
    converged: bool = True,
) -> LinearClassifier:
    """Fold standardisation in: the head on x that equals a head on (x - mean) / scale."""
    weight = weight / scale
    bias = bias - weight @ mean
    # In C order, as safetensors takes it to be.
    rows = np.ascontiguousarray(weight, dtype=np.float32)
    return LinearClassifier(rows, bias.astype(np.float32), converged)


def ridge(
    x: np.ndarray, y: np.ndarray, num_classes: int, alphas: Sequence[float]
) -> list[LinearClassifier]:
    """Least squares onto +1 for the class and -1 for the others, one head a strength.

    On standardised x, with an intercept that is not shrunk. One eigendecomposition serves all
    strengths: W = V (S + alpha)^-1 V' X'Y where X'X = V S V'.

    Args:
        x: float [N, D].
        y: int64 [N].
        num_classes: C.
        alphas: weights of the squared norm of W beside the sum of squared errors.

    Source: Hoerl & Kennard 1970, eq. 2.1; targets as scikit-learn's `RidgeClassifier`.
    """
    mean, scale = _moments(x)
    z = (x.astype(np.float64) - mean) / scale
    targets = np.where(np.arange(num_classes) == y[:, None], 1.0, -1.0)  # N C
    intercept = targets.mean(axis=0)
    values, vectors = np.linalg.eigh(z.T @ z)
    projected = vectors.T @ (z.T @ (targets - intercept))  # D C
    return [
        folded((vectors @ (projected / (values + alpha)[:, None])).T, intercept, mean, scale)
        for alpha in alphas
    ]


def logistic(
    x: np.ndarray, y: np.ndarray, num_classes: int, inverse_strengths: Sequence[float]
) -> list[LinearClassifier]:
    """Multinomial logistic regression by L-BFGS on standardised x, one head a strength.

    Each starts from the one before. A class without a picture is never predicted.

    Args:
        x: float [N, D].
        y: int64 [N].
        num_classes: C.
        inverse_strengths: scikit-learn's C.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean, scale = _moments(x)
    z = ((x - mean) / scale).astype(np.float32)
    if len(np.unique(y)) == 1:  # scikit-learn refuses what needs no learning
        bias = np.where(np.arange(num_classes) == y[0], 0.0, -np.inf)
        only = LinearClassifier(np.zeros((num_classes, x.shape[1]), np.float32), bias)
        return [only for _ in inverse_strengths]
    model = LogisticRegression(max_iter=_MAX_ITERATIONS, warm_start=True)
    heads = []
    for strength in inverse_strengths:
        model.set_params(C=strength)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # told by `converged`
            model.fit(z, y)
        weight = np.zeros((num_classes, x.shape[1]))
        bias = np.full(num_classes, -np.inf)
        # Of two classes scikit-learn keeps one row, the second's over the first's.
        rows, offsets = model.coef_, model.intercept_
        if len(model.classes_) == 2:
            rows = np.concatenate([np.zeros_like(rows), rows])
            offsets = np.concatenate([np.zeros_like(offsets), offsets])
        weight[model.classes_], bias[model.classes_] = rows, offsets
        converged = bool(model.n_iter_.max() < _MAX_ITERATIONS)
        heads.append(folded(weight, bias, mean, scale, converged))
    return heads


def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each feature, float64 [D]."""
    return x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64) + _EPS
