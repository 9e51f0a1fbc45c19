"""Quantizers against formulas in NumPy."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mimray.trainers.config.dvae import DVAEConfig
from mimray.trainers.data.rng import Stream, generator
from mimray.trainers.errors import ConfigError
from mimray.trainers.models import kmeans as kmeans_module
from mimray.trainers.models.codebook import Codebook
from mimray.trainers.models.quantizer import SMOOTHING, VectorQuantizer

K, D = 12, 5
SPHERE = pytest.mark.parametrize("sphere", [False, True], ids=["plain", "sphere"])


def config_of(**options: Any) -> DVAEConfig:
    return DVAEConfig(name="dvae", **{"codebook_size": K, "code_dim": D, **options})


def vq(seed: int = 0, **options: Any) -> VectorQuantizer:
    """A quantizer whose projection changes nothing, so that features are encodings."""
    torch.manual_seed(seed)
    rng = partial(generator, 7, Stream.CODEBOOK)
    quantizer = VectorQuantizer(config_of(**options), D, rng)
    with torch.no_grad():
        quantizer.project.weight.copy_(torch.eye(D)[:, :, None, None])
        quantizer.project.bias.zero_()
        quantizer.codebook.replace(torch.ones(K, dtype=torch.bool), torch.randn(K, D))
    if options.get("ema_decay"):
        quantizer.moving_sums.copy_(quantizer.table())
    return quantizer


def features(step: int = 0, count: int = 4, size: int = 3) -> Tensor:
    """Around few centres, so that some codes are never near."""
    rng = torch.Generator().manual_seed(step)
    centres = torch.randn(4, D, generator=torch.Generator().manual_seed(99))
    where = torch.randint(0, 4, (count, size, size), generator=rng)
    noise = 0.3 * torch.randn(count, size, size, D, generator=rng)
    return (centres[where] + noise).movedim(3, 1)  # B D h w


def rows(x: Tensor) -> np.ndarray:
    """A map as the vectors of its places, in double."""
    return x.detach().movedim(1, 3).flatten(0, 2).double().numpy()


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def brute_force(vectors: np.ndarray, table: np.ndarray) -> np.ndarray:
    return ((vectors[:, None] - table[None]) ** 2).sum(-1).argmin(1)


# Nearest codes


@SPHERE
@pytest.mark.parametrize("at_once", [1, 7 * K, 1 << 24])
def test_nearest_code__is_that_of_brute_force(
    sphere: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kmeans_module, "DISTANCES_AT_ONCE", at_once)
    quantizer, x = vq(l2_normalize=sphere), torch.randn(5, D, 4, 6)
    vectors = unit(rows(x)) if sphere else rows(x)

    codes = quantizer(x).codes

    table = quantizer.table().detach().double().numpy()
    if sphere:
        np.testing.assert_allclose(np.linalg.norm(table, axis=1), 1, atol=1e-6)
    assert codes.shape == (5, 4, 6)
    assert codes.dtype == torch.int64
    np.testing.assert_array_equal(codes.flatten().numpy(), brute_force(vectors, table))
    assert torch.equal(quantizer.codes(x), codes)
    embedded = rows(quantizer.embed(codes))
    np.testing.assert_allclose(embedded, table[codes.flatten().numpy()], atol=1e-6)


def test_codebook__learnt_or_not_takes_vectors_at_their_places():
    chosen = torch.tensor([False, True, False, True])
    for learnt in (False, True):
        codebook = Codebook(4, 2, std=1.0, learnt=learnt)
        before = codebook().detach().clone()

        codebook.replace(chosen, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))

        assert torch.equal(codebook()[~chosen], before[~chosen])
        expected = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        torch.testing.assert_close(codebook()[chosen], expected, rtol=0, atol=1e-6)


# The three terms


def through_sphere(raw: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """The gradient before normalisation, from the one behind it."""
    length = np.linalg.norm(raw, axis=-1, keepdims=True)
    direction = raw / length
    along = (direction * gradient).sum(-1, keepdims=True)
    return (gradient - along * direction) / length


@SPHERE
@pytest.mark.parametrize("beta", [0.25, 2.0])
def test_vq__has_the_losses_and_gradients_of_the_paper(sphere: bool, beta: float):
    quantizer = vq(l2_normalize=sphere, beta=beta)
    x = features().requires_grad_()
    upstream = torch.randn(x.shape)

    out = quantizer(x)
    ((out.latent * upstream).sum() + out.loss).backward()

    raw_z, raw_e = rows(x), quantizer.codebook().detach().double().numpy()
    z, e = (unit(raw_z), unit(raw_e)) if sphere else (raw_z, raw_e)
    code = brute_force(z, e)
    apart = z - e[code]  # M D
    assert out.terms["commitment"].item() == pytest.approx((apart**2).mean(), abs=1e-6)
    assert out.terms["codebook"].item() == pytest.approx((apart**2).mean(), abs=1e-6)
    assert out.loss.item() == pytest.approx((1 + beta) * (apart**2).mean(), abs=1e-5)
    np.testing.assert_allclose(rows(out.latent), e[code], atol=1e-6)
    # The encoder: the decoder's gradient as if nothing had been rounded, and the commitment.
    to_encoder = rows(upstream) + beta * 2 * apart / apart.size
    # The codebook: its own term alone.
    to_codes = np.zeros_like(e)
    np.add.at(to_codes, code, -2 * apart / apart.size)
    if sphere:
        to_encoder = through_sphere(raw_z, to_encoder)
        to_codes = through_sphere(raw_e, to_codes)
    np.testing.assert_allclose(rows(x.grad), to_encoder, atol=1e-5)
    np.testing.assert_allclose(quantizer.codebook.learnt.grad.numpy(), to_codes, atol=1e-6)


def test_moving_codebook__has_no_codebook_term_and_nothing_to_learn():
    quantizer = vq(ema_decay=0.9, beta=0.5)

    out = quantizer(features())

    assert set(out.terms) == {"commitment"}
    assert out.loss.item() == pytest.approx(0.5 * out.terms["commitment"].item())
    assert not list(quantizer.codebook.parameters())


# Moving averages


@SPHERE
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_ema__is_the_recursion_of_the_paper(sphere: bool, micro_batches: int):
    decay = 0.8
    quantizer = vq(ema_decay=decay, l2_normalize=sphere).train()
    e = quantizer.table().double().numpy()
    n, m = np.ones(K), e.copy()
    unused = np.ones(K, dtype=bool)

    for step in range(6):
        x = features(step)
        for micro in x.chunk(micro_batches):
            quantizer(micro)
        quantizer.after_step(step + 1)

        z = unit(rows(x)) if sphere else rows(x)
        one_hot = np.eye(K)[brute_force(z, e)]  # M K
        counts = one_hot.sum(0)
        n = decay * n + (1 - decay) * counts
        m = decay * m + (1 - decay) * one_hot.T @ z
        smoothed = (n + SMOOTHING) / (n.sum() + K * SMOOTHING) * n.sum()
        moved = m / smoothed[:, None]
        e = np.where(counts[:, None] > 0, unit(moved) if sphere else moved, e)
        unused &= counts == 0
        np.testing.assert_allclose(quantizer.table().numpy(), e, atol=1e-5)

    assert unused.any()
    assert not unused.all()


def test_ema__leaves_an_unused_code_where_it_is_for_ever():
    quantizer = vq(ema_decay=0.5).train()
    before = quantizer.table().clone()
    x = before[0].view(1, D, 1, 1).expand(1, D, 2, 2)

    for step in range(1, 400):
        quantizer(x)
        quantizer.after_step(step)

    assert torch.equal(quantizer.table()[1:], before[1:])
    # The used one but for the smoothing.
    torch.testing.assert_close(quantizer.table()[0], before[0], rtol=K * SMOOTHING, atol=0)


def test_evaluation__leaves_no_trace():
    quantizer = vq(ema_decay=0.5, revive_below_share=0.5, kmeans_init=True).eval()
    before = {k: v.clone() for k, v in quantizer.named_buffers()}

    quantizer(features())

    assert all(torch.equal(v, before[k]) for k, v in quantizer.named_buffers())


# K-means


def inertia(vectors: Tensor, means: Tensor) -> float:
    return float(torch.cdist(vectors.double(), means.double()).square().amin(1).sum())


@SPHERE
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_kmeans_start__is_over_the_first_step_which_has_no_codes(
    sphere: bool, ema_decay: float | None
):
    quantizer = vq(kmeans_init=True, l2_normalize=sphere, ema_decay=ema_decay).train()
    x = features()
    vectors = torch.from_numpy(unit(rows(x)) if sphere else rows(x)).float()
    before = inertia(vectors, quantizer.table().detach())

    outs = [quantizer(micro) for micro in x.chunk(2)]
    figures = quantizer.after_step(1)
    table = quantizer.table().detach().clone()
    second = quantizer(x)

    for out, micro in zip(outs, x.chunk(2), strict=True):
        assert out.loss.item() == 0
        passed = unit(rows(micro)) if sphere else rows(micro)
        np.testing.assert_allclose(rows(out.latent), passed, atol=1e-6)
    # A fixed point of k-means or close to it.
    assert inertia(vectors, table) < 0.2 * before
    expected = inertia(vectors, table) / vectors.numel()
    assert second.terms["commitment"].item() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(quantizer.table(), table)
    mean = len(vectors) / K
    assert (quantizer.uses == mean).all()
    if ema_decay:
        sums = quantizer.moving_sums
        torch.testing.assert_close(F.normalize(sums) if sphere else sums / mean, table)
    counts = np.bincount(brute_force(vectors.numpy(), table.numpy()), minlength=K)
    assert figures["codebook_usage"] == pytest.approx((counts > 0).mean())
    p = counts[counts > 0] / counts.sum()
    assert figures["codebook_perplexity"] == pytest.approx(np.exp(-(p * np.log(p)).sum()))


def test_kmeans_start__gives_a_learnt_codebook_gradients_of_zero():
    quantizer = vq(kmeans_init=True).train()

    quantizer(features()).loss.backward()

    assert quantizer.codebook.learnt.grad is not None
    assert not quantizer.codebook.learnt.grad.any()


def test_kmeans_start__wants_as_many_encodings_as_codes():
    quantizer = vq(kmeans_init=True).train()
    quantizer(features(count=1))

    with pytest.raises(ConfigError, match=r"codebook_size 12 codes of the 9 enc") as caught:
        quantizer.after_step(1)

    assert caught.value.on_every_rank


# Usage


def test_usage__is_the_share_of_codes_used_over_the_window():
    quantizer = vq(usage_window_steps=2).train()
    table = quantizer.table().detach()
    steps = [[0, 0, 0, 1], [2, 2, 2, 2], [2, 2, 3, 3], [2, 2, 2, 2]]

    found = []
    for step, codes in enumerate(steps):
        for code in codes:
            quantizer(table[code].view(1, D, 1, 1))
        found.append(quantizer.after_step(step + 1))

    usage = [round(figures["codebook_usage"] * K) for figures in found]
    assert usage == [2, 3, 2, 2]
    p = np.array([0.75, 0.25])
    expected = [np.exp(-(p * np.log(p)).sum()), 1, 2, 1]
    np.testing.assert_allclose([f["codebook_perplexity"] for f in found], expected, rtol=1e-6)


# Revival


@pytest.mark.parametrize("options", [{"ema_decay": 0.5}, {"ema_decay": 0.5, "l2_normalize": True}])
def test_revival__puts_rare_codes_onto_encodings_of_the_step(options: dict[str, Any]):
    share = 0.3
    quantizer = vq(revive_below_share=share, **options).train()
    plain = vq(**options).train()
    x = features()
    for q in (quantizer, plain):
        for micro in x.chunk(2):
            q(micro)
    figures, plain_figures = quantizer.after_step(7), plain.after_step(7)

    z = unit(rows(x)) if options.get("l2_normalize") else rows(x)
    rare = plain.uses < share * len(z) / K
    assert 0 < rare.sum() < K
    assert figures["codes_revived"] == rare.sum()
    assert plain_figures["codes_revived"] == 0
    table = quantizer.table()
    assert torch.equal(table[~rare], plain.table()[~rare])
    distance = np.abs(table[rare].numpy()[:, None] - z[None]).max(-1).min(1)
    assert distance.max() < 1e-6
    assert (quantizer.uses[rare] == len(z) / K).all()
    weighed = quantizer.moving_sums[rare] / quantizer.uses[rare].unsqueeze(1)
    torch.testing.assert_close(weighed, table[rare], rtol=0, atol=1e-6)


def test_revival__moves_a_learnt_code_without_touching_its_parameter():
    quantizer = vq(revive_below_share=0.331).train()  # uses are 1 or 0.99 and more, the mean is 3
    learnt = quantizer.codebook.learnt.detach().clone()
    before, x = quantizer.table().detach().clone(), features()

    quantizer(x)
    quantizer.after_step(7)

    assert torch.equal(quantizer.codebook.learnt, learnt)
    moved = (quantizer.table() != before).any(1)
    assert 0 < moved.sum() < K
    table = quantizer.table()[moved].detach().numpy()
    assert np.abs(table[:, None] - rows(x)[None]).max(-1).min(1).max() < 1e-6


def test_revival__depends_on_seed_and_step_alone():
    def revived(step: int) -> Tensor:
        quantizer = vq(ema_decay=0.5, revive_below_share=0.3).train()
        torch.manual_seed(step)  # must not matter
        quantizer(features())
        quantizer.after_step(step)
        return quantizer.table()

    assert torch.equal(revived(5), revived(5))
    assert not torch.equal(revived(5), revived(6))


@pytest.mark.parametrize("encodings_a_code", [2, 8, 64])
def test_revival__leaves_codes_that_are_used_alike_whatever_the_batch(encodings_a_code: int):
    """A threshold of 2 a step, as there once was, replaces a fifth of them at 2 a code."""
    quantizer = vq(revive_below_share=0.1, ema_decay=0.99, kmeans_init=True).train()
    torch.manual_seed(0)
    found = []
    for step in range(60):
        x = torch.randn(encodings_a_code, D, 3, 4)  # 12 places for 12 codes
        quantizer(x)
        found.append(quantizer.after_step(step + 1)["codes_revived"])

    assert found == [0] * 60


@pytest.mark.parametrize("options", [{"ema_decay": 0.9}, {}, {"kmeans_init": True}])
@pytest.mark.parametrize("count", [2, 4, 64])
def test_revival__leaves_a_new_codebook_alone(options: dict[str, Any], count: int):
    """A start at 1 use is idle at once in a large batch; so are small clusters of k-means."""
    quantizer = vq(revive_below_share=0.4, **options).train()

    found = []
    for step in range(4):
        quantizer(features(step, count))
        found.append(quantizer.after_step(step + 1)["codes_revived"])

    assert found == [0] * 4


def test_revival__of_a_new_codebook_leaves_the_averages_of_codes_consistent():
    quantizer, x = vq(revive_below_share=0.4, ema_decay=0.5).train(), features()
    before = quantizer.table().clone()
    counts = np.bincount(brute_force(rows(x), before.numpy()), minlength=K)

    quantizer(x)
    quantizer.after_step(1)

    mean = 36 / K
    np.testing.assert_allclose(quantizer.uses, 0.5 * mean + 0.5 * counts, rtol=1e-6)
    idle = torch.from_numpy(counts == 0)
    weighed = quantizer.moving_sums[idle] / quantizer.uses[idle].unsqueeze(1)
    torch.testing.assert_close(weighed, before[idle], rtol=1e-6, atol=1e-6)


def test_revival__of_a_dead_code_comes_once_its_average_has_faded():
    # From the mean, 0.9 to the power of n is below 0.1 from n = 22 on.
    quantizer = vq(revive_below_share=0.1, ema_decay=0.9).train()
    x = features(count=4)
    found = []
    for step in range(25):
        quantizer(x)
        found.append(quantizer.after_step(step + 1)["codes_revived"])

    assert np.flatnonzero(found)[0] + 1 == 22


def test_revival__ends_before_the_run_does():
    def revived(until: float) -> list[float]:
        options = {"ema_decay": 0.5, "revive_below_share": 0.3, "revive_until_share": until}
        quantizer, found = vq(**options).train(), []
        for step in range(10):
            quantizer.at_step(step, 10)
            quantizer(features(step))
            found.append(quantizer.after_step(step + 1)["codes_revived"])
        assert not quantizer._seen
        return found

    half, whole = revived(0.5), revived(1.0)
    assert half[:5] == whole[:5]
    assert sum(half[:5]) > 0
    assert sum(whole[5:]) > 0
    assert half[5:] == [0] * 5
