"""Linear CKA: the similarity of two encoders' features of the same pictures, without labels."""

from __future__ import annotations

import math

import numpy as np

from mimray.trainers.evaluation.uncertainty import Figure, by_jackknife

MIN_PICTURES = 5
"""Fewest pictures of which CKA is estimated; the formula's denominator needs four."""


def cka_figure(x: np.ndarray, y: np.ndarray, fingerprint: str, index: np.ndarray) -> Figure:
    """The CKA of two encoders with its standard error, by the jackknife over pictures.

    Args:
        x: float [N, D], features by one encoder, a picture a row.
        y: float [N, E], features of the same pictures by another.
        fingerprint: fingerprint of the pictures.
        index: int64 [N], the place of each picture in its dataset.
    """
    # Pictures that are drawn twice are alike to every encoder, so a bootstrap would exaggerate.
    evidence = by_jackknife(lambda out: linear_cka(x[~out], y[~out]), fingerprint, index)
    value = linear_cka(x, y)
    if evidence is None or not math.isfinite(value):
        return Figure(value)
    return Figure(value, evidence.standard_error, evidence.as_json())


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Centred kernel alignment of linear kernels, from unbiased estimates of HSIC.

    1 where the two differ by a rotation and a scale alone; about 0 where they have nothing in
    common, whatever the widths, which the biased estimate of Kornblith et al. has only for many
    more pictures than channels.

    Args:
        x: float [N, D], N at least `MIN_PICTURES` less one.
        y: float [N, E].

    Returns:
        The alignment; not a number where the features of all pictures are equal.

    Source: Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited",
        eq. 4; HSIC by Song et al. 2012, "Feature Selection via Dependence Maximization", eq. 5,
        as Nguyen et al. 2021, "Do Wide and Deep Networks Learn the Same Things?" use it.
    """
    a, b = (z.astype(np.float64) for z in (x, y))
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    product = _hsic(a, a) * _hsic(b, b)
    return _hsic(a, b) / math.sqrt(product) if product > 0 else math.nan


def _hsic(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased HSIC of linear kernels, without their matrices [N, N].

    K and L below are a @ a.T and b @ b.T with diagonals of 0.
    """
    n = len(a)
    diagonal_k, diagonal_l = (a * a).sum(axis=1), (b * b).sum(axis=1)  # N each
    trace = ((a.T @ b) ** 2).sum() - diagonal_k @ diagonal_l  # of K L
    rows_k, rows_l = a @ a.sum(axis=0) - diagonal_k, b @ b.sum(axis=0) - diagonal_l  # sums, N each
    means = rows_k.sum() * rows_l.sum() / ((n - 1) * (n - 2))
    return float((trace + means - 2 / (n - 2) * (rows_k @ rows_l)) / (n * (n - 3)))
