"""Gumbel-softmax against formulas in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mimray.trainers.config.dvae import DVAEConfig
from mimray.trainers.models.quantizer import GumbelQuantizer, kl_from_uniform

K, D = 12, 5


def gumbel(**options: Any) -> GumbelQuantizer:
    config = DVAEConfig(name="dvae", quantizer="gumbel", codebook_size=K, code_dim=D, **options)
    torch.manual_seed(0)
    return GumbelQuantizer(config, D)


def test_gumbel__kl_is_the_formula():
    logits = torch.randn(2, 3, K)
    q = np.exp(logits.double().numpy())
    q /= q.sum(-1, keepdims=True)

    np.testing.assert_allclose(kl_from_uniform(logits), (q * np.log(q * K)).sum(-1), atol=1e-6)
    assert kl_from_uniform(torch.zeros(K)).item() == pytest.approx(0, abs=1e-6)
    certain = torch.zeros(K).index_fill(0, torch.tensor(3), 100.0)
    assert kl_from_uniform(certain).item() == pytest.approx(np.log(K), rel=1e-6)


def test_gumbel__mixes_codes_by_the_paper_while_training():
    quantizer, x = gumbel(temperature=0.7, kl_weight=3.0).train(), torch.randn(4, D, 3, 3)
    logits = quantizer.to_logits(x).movedim(1, 3).detach()  # B h w K

    torch.manual_seed(5)
    out = quantizer(x)

    torch.manual_seed(5)
    noise = -torch.empty(logits.shape).exponential_().log()
    soft = ((logits + noise) / 0.7).exp()
    soft = soft / soft.sum(-1, keepdim=True)
    expected = torch.einsum("bhwk,kd->bdhw", soft, quantizer.table())
    torch.testing.assert_close(out.latent, expected, rtol=0, atol=1e-5)
    assert torch.equal(out.codes, logits.argmax(-1))
    kl = kl_from_uniform(logits).mean()
    assert out.loss.item() == pytest.approx(3 * kl.item(), rel=1e-5)
    assert out.terms["kl"].item() == pytest.approx(kl.item(), rel=1e-5)
    assert out.terms["temperature"].item() == pytest.approx(0.7)


def test_gumbel__takes_the_likeliest_code_in_evaluation():
    quantizer, x = gumbel().eval(), torch.randn(4, D, 3, 3)

    out = quantizer(x)

    likeliest = quantizer.to_logits(x).argmax(1)
    assert torch.equal(out.codes, likeliest)
    assert torch.equal(quantizer.codes(x), likeliest)
    expected = quantizer.table()[likeliest].movedim(3, 1)
    assert torch.equal(out.latent, expected)
    assert torch.equal(quantizer.embed(likeliest), expected)


@pytest.mark.parametrize(("steps", "end"), [(0, 40), (20, 20)])
def test_gumbel__temperature_falls_by_a_cosine(steps: int, end: int):
    quantizer = gumbel(temperature=2.0, min_temperature=0.5, temperature_steps=steps)

    def at(step: int) -> float:
        quantizer.at_step(step, 40)
        return quantizer.temperature

    assert at(0) == 2.0
    assert at(end // 2) == pytest.approx(1.25)
    assert at(end // 4) == pytest.approx(0.5 + 1.5 * (1 + np.cos(np.pi / 4)) / 2)
    assert at(end) == at(100) == pytest.approx(0.5)


def test_gumbel__trains_logits_and_codebook():
    quantizer = gumbel(kl_weight=0.1).train()

    out = quantizer(torch.randn(4, D, 3, 3))
    (out.latent.square().mean() + out.loss).backward()

    assert all(p.grad.any() for p in quantizer.parameters())
    figures = quantizer.after_step(1)
    counts = np.bincount(out.codes.flatten().numpy(), minlength=K)
    assert figures["codebook_usage"] == pytest.approx((counts > 0).mean())
