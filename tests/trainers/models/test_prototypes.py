"""Prototypes against torch's own weight normalisation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from mimray.trainers.models.prototypes import Prototypes


def with_weight_norm(prototypes: Prototypes) -> nn.Module:
    """The published layer with the same weights: torch's `weight_norm` of a linear layer."""
    size, width = prototypes.direction.shape
    layer = weight_norm(nn.Linear(width, size, bias=False))
    layer.parametrizations.weight.original1.data.copy_(prototypes.direction)
    gain = torch.ones(size, 1) if prototypes.gain is None else prototypes.gain
    layer.parametrizations.weight.original0.data.copy_(gain)
    return layer


@pytest.mark.parametrize("trains_gain", [False, True])
def test_scores_and_gradients__equal_weight_normalisation_of_torch(trains_gain: bool):
    torch.manual_seed(0)
    prototypes = Prototypes(6, 9, trains_gain=trains_gain)
    if prototypes.gain is not None:
        prototypes.gain.data += 0.1 * torch.randn(9, 1)
    published = with_weight_norm(prototypes)
    vectors = torch.randn(2, 5, 6)
    weights = torch.randn(2, 5, 9)

    found, expected = prototypes(vectors), published(F.normalize(vectors, dim=-1))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()

    torch.testing.assert_close(found, expected)
    originals = published.parametrizations.weight
    torch.testing.assert_close(prototypes.direction.grad, originals.original1.grad)
    if prototypes.gain is not None:
        torch.testing.assert_close(prototypes.gain.grad, originals.original0.grad)


def test_start__is_of_gain_one_and_of_small_truncated_directions():
    prototypes = Prototypes(64, 512, trains_gain=True)
    assert torch.equal(prototypes.gain, torch.ones(512, 1))
    assert prototypes.direction.std().item() == pytest.approx(0.02, rel=0.05)
    assert [n for n, _ in Prototypes(4, 8, trains_gain=False).named_parameters()] == ["direction"]


def test_lengths__of_vectors_and_directions_have_no_effect():
    prototypes = Prototypes(6, 9, trains_gain=False)
    vectors = torch.randn(4, 6)
    before = prototypes(vectors)
    prototypes.direction.data *= torch.rand(9, 1) + 0.5
    torch.testing.assert_close(prototypes(3 * vectors), before)
    assert before.abs().max() <= 1 + 1e-6
    assert prototypes(torch.zeros(1, 6)).isfinite().all()


def test_precision__of_16_bit_weights_is_lost_by_the_product_alone():
    prototypes = Prototypes(64, 9, trains_gain=True)
    vectors = torch.randn(4, 64).bfloat16()
    exact = prototypes(vectors.float())
    found = prototypes.bfloat16()(vectors)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, atol=0.01, rtol=0)
