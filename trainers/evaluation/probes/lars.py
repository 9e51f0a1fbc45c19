"""The linear probe of the MAE paper: batch norm, LARS, and many learning rates in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mimray.trainers.config.evaluation.linear import LinearConfig
from mimray.trainers.data.rng import Stream, generator, permutation
from mimray.trainers.errors import NonFiniteLossError
from mimray.trainers.evaluation.probes.linear_classifiers import LinearClassifier, folded
from mimray.trainers.evaluation.score import Progress

NORM_EPS = 1e-6
INIT_STD = 0.01


class Lars:
    """Layer-wise adaptive rates for L independent heads at once.

    A head's weight moves by its gradient scaled to `trust_coefficient` times the weight's norm;
    its bias by its plain gradient, and does not decay.

    Args:
        weight: [L, C, D], with a gradient when `step` is called.
        bias: [L, C], likewise.
        momentum: share of the last move that is kept.
        trust_coefficient: length of a move over that of the weight, at a learning rate of 1.
        weight_decay: added to the gradient of weights, times the weight.

    Source: You et al. 2017, Algorithm 1; the learning rate outside the momentum and biases
        apart as in the official MAE code (`util/lars.py`).
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        *,
        momentum: float,
        trust_coefficient: float,
        weight_decay: float,
    ) -> None:
        self.weight, self.bias = weight, bias
        self.momentum = momentum
        self.trust_coefficient = trust_coefficient
        self.weight_decay = weight_decay
        self._weight_move, self._bias_move = torch.zeros_like(weight), torch.zeros_like(bias)

    @torch.no_grad()
    def step(self, lr: Tensor) -> None:
        """Update all heads, each at its own rate.

        Args:
            lr: [L].
        """
        assert self.weight.grad is not None
        assert self.bias.grad is not None
        gradient = self.weight.grad + self.weight_decay * self.weight  # L C D
        weight_norm = self.weight.flatten(1).norm(dim=1)  # L
        gradient_norm = gradient.flatten(1).norm(dim=1)
        trust = self.trust_coefficient * weight_norm / gradient_norm
        trust = torch.where((weight_norm > 0) & (gradient_norm > 0), trust, 1.0)
        self._weight_move.mul_(self.momentum).add_(trust[:, None, None] * gradient)
        self._bias_move.mul_(self.momentum).add_(self.bias.grad)
        self.weight -= lr[:, None, None] * self._weight_move
        self.bias -= lr[:, None] * self._bias_move


def train_lars(
    x: np.ndarray,
    y: np.ndarray,
    num_classes: int,
    base_lrs: Sequence[float],
    config: LinearConfig,
    *,
    seed: int,
    device: str = "cpu",
    phase: str = "linear probe",
    progress: Progress | None = None,
) -> list[LinearClassifier]:
    """Train one head a learning rate, all on the same batches from the same beginning.

    Vectors are normalised by their batch's statistics, and at the end by those of all of them:
    what batch norm's running ones estimate, had from a pass over what is in memory anyway.

    Args:
        x: float32 [N, D], or [N, V, D] of V views, of which epoch e sees view e mod V.
        y: int64 [N].
        num_classes: C.
        base_lrs: per 256 pictures of a batch.
        config: schedule and optimiser.
        seed: seed of the initialisation and the order.
        device: device to train on.
        phase: name of the work in `progress`.
        progress: called with the number of epochs done.

    Raises:
        NonFiniteLossError: every head diverged.

    Source: He et al. 2022, Table 10; official code `main_linprobe.py`.
    """
    views = torch.from_numpy(x if x.ndim == 3 else x[:, None])  # N V D
    labels = torch.from_numpy(y)
    batch_size = min(config.batch_size, len(views))
    steps_per_epoch = len(views) // batch_size  # what does not fill a batch is left out
    peak = torch.tensor(base_lrs, dtype=torch.float32, device=device) * batch_size / 256  # L
    rng = generator(seed, Stream.PROBE_ORDER, 0, 0)
    first = INIT_STD * rng.standard_normal((num_classes, views.shape[2]), dtype=np.float32)
    weight = torch.from_numpy(first).to(device).repeat(len(base_lrs), 1, 1).requires_grad_()
    bias = torch.zeros(len(base_lrs), num_classes, device=device, requires_grad=True)
    lars = Lars(
        weight,
        bias,
        momentum=config.momentum,
        trust_coefficient=config.trust_coefficient,
        weight_decay=config.weight_decay,
    )
    for epoch in range(config.epochs):
        # Counted from 1: the generator of 0 made the heads.
        rows = permutation(generator(seed, Stream.PROBE_ORDER, epoch + 1), len(views))
        for step in range(steps_per_epoch):
            part = torch.from_numpy(rows[step * batch_size : (step + 1) * batch_size])
            inputs = views[part, epoch % views.shape[1]].to(device)  # B D
            inputs = F.batch_norm(inputs, None, None, training=True, eps=NORM_EPS)
            losses = _losses(weight, bias, inputs, labels[part].to(device))
            weight.grad = bias.grad = None
            losses.sum().backward()  # type: ignore[no-untyped-call]
            lars.step(peak * _share_of_peak(config, epoch + step / steps_per_epoch))
        if not losses.isfinite().any():
            raise NonFiniteLossError(
                f"the linear probe diverged in epoch {epoch + 1} at every learning rate",
                hint="--set base_lrs=… with smaller ones",
            )
        if progress is not None:
            progress(phase, epoch + 1, config.epochs)
    mean = views.double().mean(dim=(0, 1)).numpy()
    scale = (views.double().var(dim=(0, 1), correction=0) + NORM_EPS).sqrt().numpy()
    weights, biases = weight.detach().cpu().numpy(), bias.detach().cpu().numpy()
    return [folded(w, b, mean, scale) for w, b in zip(weights, biases, strict=True)]


def _losses(weight: Tensor, bias: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each head, [L]."""
    scores = torch.einsum("bd,lcd->lbc", inputs, weight) + bias[:, None]
    picked = F.cross_entropy(
        scores.flatten(0, 1), labels.repeat(len(weight)), reduction="none"
    )  # L*B
    return picked.view(len(weight), -1).mean(dim=1)


def _share_of_peak(config: LinearConfig, epoch: float) -> float:
    """Linear warm-up, then half a cosine to zero; `epoch` counts parts of epochs too."""
    warmup = config.epochs / 9 if config.warmup_epochs is None else config.warmup_epochs
    if epoch < warmup:
        return epoch / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (config.epochs - warmup)))
