"""K-means against scikit-learn and NumPy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mimray.trainers.models.kmeans import cluster, kmeans, nearest_codes

D = 5


def test_nearest_code__is_the_first_of_equals():
    table = torch.ones(3, 2)

    assert nearest_codes(torch.randn(4, 2), table).tolist() == [0] * 4


def blobs(seed: int = 0, dim: int = D) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(6, dim, generator=rng)
    return (centres[:, None] + torch.randn(6, 40, dim, generator=rng)).flatten(0, 1)


def inertia(vectors: Tensor, means: Tensor) -> float:
    return float(torch.cdist(vectors.double(), means.double()).square().amin(1).sum())


def test_kmeans__is_that_of_scikit_learn():
    from sklearn.cluster import KMeans

    vectors = blobs()
    start = vectors[::30].clone()
    theirs = KMeans(len(start), init=start.numpy(), n_init=1, max_iter=7, tol=0).fit(vectors)

    ours = kmeans(vectors, start, iterations=7)

    np.testing.assert_allclose(ours.numpy(), theirs.cluster_centers_, atol=1e-5)
    values = [inertia(vectors, kmeans(vectors, start, iterations=i)) for i in range(8)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.8 * values[0]


def test_kmeans__on_the_sphere_takes_the_direction_of_the_mean():
    vectors = F.normalize(blobs(), dim=1)
    z = vectors.double().numpy()
    means = z[::30].copy()
    for _ in range(5):
        nearest = (z @ means.T).argmax(1)
        means = np.stack([z[nearest == k].sum(0) for k in range(len(means))])
        means /= np.linalg.norm(means, axis=1, keepdims=True)

    ours = kmeans(vectors, vectors[::30], iterations=5, spherical=True)

    np.testing.assert_allclose(ours.numpy(), means, atol=1e-5)


def test_kmeans__keeps_a_mean_without_vectors():
    vectors, far = blobs(), torch.full((1, D), 1e3)

    means = kmeans(vectors, torch.cat([vectors[:3], far]))

    assert torch.equal(means[3:], far)


def test_cluster__counts_and_sums_the_vectors_of_a_code():
    vectors = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])

    counts, sums = cluster(vectors, torch.tensor([2, 0, 2]), 4)

    assert counts.tolist() == [1, 0, 2, 0]
    assert sums.tolist() == [[3, 4], [0, 0], [6, 8], [0, 0]]
