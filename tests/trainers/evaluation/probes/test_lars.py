from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mimray.trainers.config.evaluation.linear import LinearConfig
from mimray.trainers.errors import NonFiniteLossError
from mimray.trainers.evaluation.probes.lars import Lars, _share_of_peak, train_lars


def test_lars__steps_equal_the_formula():
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(4, 6)), rng.normal(size=4)
    weight[0] = 0.3
    ours_w = torch.from_numpy(weight.copy())[None].requires_grad_()
    ours_b = torch.from_numpy(bias.copy())[None].requires_grad_()
    lars = Lars(ours_w, ours_b, momentum=0.9, trust_coefficient=0.001, weight_decay=0.02)
    move_w, move_b = np.zeros_like(weight), np.zeros_like(bias)

    for lr in (3.0, 2.0, 0.5, 0.1):
        gradient_w, gradient_b = rng.normal(size=(4, 6)), rng.normal(size=4)
        ours_w.grad = torch.from_numpy(gradient_w)[None]
        ours_b.grad = torch.from_numpy(gradient_b)[None]
        lars.step(torch.tensor([lr], dtype=torch.float64))
        decayed = gradient_w + 0.02 * weight
        trust = 0.001 * math.sqrt((weight**2).sum()) / math.sqrt((decayed**2).sum())
        move_w = 0.9 * move_w + trust * decayed
        move_b = 0.9 * move_b + gradient_b  # neither trust nor decay
        weight, bias = weight - lr * move_w, bias - lr * move_b
        np.testing.assert_allclose(ours_w[0].detach(), weight, rtol=1e-12)
        np.testing.assert_allclose(ours_b[0].detach(), bias, rtol=1e-12)


def test_lars__a_head_at_zero_or_without_gradient_moves_plainly():
    weight = torch.zeros(2, 3, 2, requires_grad=True)
    bias = torch.zeros(2, 3, requires_grad=True)
    weight.grad, bias.grad = torch.ones_like(weight), torch.zeros_like(bias)
    weight.grad[1] = 0
    lars = Lars(weight, bias, momentum=0.9, trust_coefficient=0.001, weight_decay=0.0)

    lars.step(torch.tensor([0.5, 0.5]))

    assert weight[0].eq(-0.5).all()
    assert weight[1].eq(0).all()


def clusters(count: int = 300) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 6, count)
    x = 3 * np.random.default_rng(0).normal(size=(6, 10))[labels] + rng.normal(size=(count, 10))
    return (7 + 5 * x).astype(np.float32), labels


def test_train_lars__together_are_what_each_is_alone():
    x, y = clusters()
    config, rates = LinearConfig(solver="lars", epochs=8, batch_size=64), (0.1, 3.0, 30.0)

    together = train_lars(x, y, 6, rates, config, seed=3)

    for rate, head in zip(rates, together, strict=True):
        (alone,) = train_lars(x, y, 6, (rate,), config, seed=3)
        np.testing.assert_allclose(head.weight, alone.weight, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(head.bias, alone.bias, rtol=1e-4, atol=1e-5)


def test_train_lars__learns():
    x, y = clusters()

    (head,) = train_lars(x, y, 6, (30.0,), LinearConfig(solver="lars", batch_size=64), seed=3)

    assert head.accuracy(x, y) > 0.98


def test_train_lars__equals_the_official_loop():
    """Batch norm, linear layer and cross entropy of torch, LARS and schedule written out."""
    x, y = clusters(256)
    config = LinearConfig(solver="lars", epochs=9, batch_size=256)
    (ours,) = train_lars(x, y, 6, (20.0,), config, seed=3)
    (first,) = train_lars(x, y, 6, (0.0,), config, seed=3)  # as it was before training

    norm = torch.nn.BatchNorm1d(10, affine=False, eps=1e-6, momentum=1.0)
    norm(torch.from_numpy(x))
    scale = (norm.running_var * 255 / 256 + 1e-6).sqrt()
    linear = torch.nn.Linear(10, 6)
    linear.weight.data = torch.from_numpy(first.weight) * scale
    linear.bias.data.zero_()
    moves = [torch.zeros_like(p) for p in linear.parameters()]
    for epoch in range(9):
        lr = 20 * (epoch if epoch < 1 else 0.5 * (1 + math.cos(math.pi * (epoch - 1) / 8)))
        linear.zero_grad()
        F.cross_entropy(linear(norm(torch.from_numpy(x))), torch.from_numpy(y)).backward()
        for p, move in zip(linear.parameters(), moves, strict=True):
            trust = 0.001 * p.data.norm() / p.grad.norm() if p.ndim > 1 else 1.0
            move.mul_(0.9).add_(trust * p.grad)
            p.data -= lr * move

    scores = linear(norm(torch.from_numpy(x))).detach().numpy()
    np.testing.assert_allclose(ours.scores(x), scores, atol=2e-4)


def test_train_lars__epochs_cycle_through_views():
    x, y = clusters()
    views = np.stack([x, x + 0.5], axis=1)
    config = LinearConfig(solver="lars", epochs=2, batch_size=300)

    (both,) = train_lars(views, y, 6, (10.0,), config, seed=0)
    (first,) = train_lars(views[:, :1], y, 6, (10.0,), config, seed=0)
    (plain,) = train_lars(x, y, 6, (10.0,), config, seed=0)

    np.testing.assert_array_equal(first.weight, plain.weight)
    assert not np.allclose(both.bias, plain.bias)


def test_train_lars__a_probe_that_diverges_says_so():
    x, y = clusters(64)
    x[0, 0] = np.nan
    with pytest.raises(NonFiniteLossError, match="diverged in epoch 1"):
        train_lars(x, y, 6, (0.1,), LinearConfig(solver="lars"), seed=0)


def test_share_of_peak__is_the_paper_s_by_default():
    config = LinearConfig(solver="lars")

    assert [_share_of_peak(config, e) for e in (0, 5, 10)] == [0, 0.5, 1]
    assert _share_of_peak(config, 50) == pytest.approx(0.5)
    assert _share_of_peak(config, 90) == pytest.approx(0)
