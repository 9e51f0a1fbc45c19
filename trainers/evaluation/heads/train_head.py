"""Training of a head: minutes on one device, so a loop of its own beside the engine's.

Continues after a kill from the last whole epoch, and repeats an undisturbed run: order and
views are counted, device randomness is seeded from the step.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from mimray.trainers.config.evaluation.head import HeadConfig
from mimray.trainers.data.rng import Stream, generator, permutation
from mimray.trainers.errors import NonFiniteLossError
from mimray.trainers.evaluation.score import Progress

logger = logging.getLogger(__name__)

Batch = TypeVar("Batch")
Row = dict[str, float]
STATE = "fit.pt"


def train_head(
    head: nn.Module,
    encoder: nn.Module | None,
    *,
    num_examples: int,
    make_batch: Callable[[int, np.ndarray], Batch],
    losses_of: Callable[[Batch], dict[str, Tensor]],
    config: HeadConfig,
    seed: int,
    folder: Path,
    identity: str,
    progress: Progress,
    phase: str = "training the head",
) -> list[Row]:
    """Train a head, and with it the encoder where one is given.

    AdamW, linear warm-up, per-step half-cosine to zero; weights decay, biases and norms do not.

    Args:
        head: head to train, in place.
        encoder: the encoder to train with it, at `config.encoder_lr_scale` of its rate; its
            gradients are on meanwhile. None for a frozen one.
        num_examples: training pictures.
        make_batch: function from (epoch, int64 [B] of examples) to what `losses_of` takes; pure,
            and called in this thread.
        losses_of: the losses of a batch by name; their sum is minimised.
        config: length, rates, batch size.
        seed: seed of the order, and of what is drawn on the device.
        folder: folder of the state between epochs, for a run that is started again.
        identity: digest of all that shapes the result; the state of another is not continued.
        progress: called with the number of steps done.
        phase: name of the work in `progress`.

    Returns:
        A row an epoch: `epoch`, `lr`, and the mean of each loss.

    Raises:
        NonFiniteLossError: a loss became NaN or infinite.
    """
    size = min(config.batch_size, num_examples)
    per_epoch = num_examples // size
    steps, warmup = config.epochs * per_epoch, config.warmup_epochs * per_epoch
    trained = [module for module in (head, encoder) if module is not None]
    if encoder is not None:
        encoder.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [
            *_groups(head, config.weight_decay, 1.0),
            *(
                []
                if encoder is None
                else _groups(encoder, config.weight_decay, config.encoder_lr_scale)
            ),
        ],
        lr=config.lr,
    )
    rows = _resume(folder / STATE, identity, trained, optimizer)
    for module in trained:
        module.train()
    with _repeatable():
        for epoch in range(len(rows), config.epochs):
            order = permutation(generator(seed, Stream.HEAD_ORDER, epoch), num_examples)
            sums: dict[str, float] = {}
            for batch in range(per_epoch):
                step = epoch * per_epoch + batch
                factor = _lr_factor(step, steps, warmup)
                for group in optimizer.param_groups:
                    group["lr"] = config.lr * factor * group["lr_scale"]
                # Dropout and the sampling of anchors depend on the step alone.
                torch.manual_seed(int(generator(seed, Stream.HEAD_DEVICE, step).integers(2**62)))
                losses = losses_of(make_batch(epoch, order[batch * size : (batch + 1) * size]))
                loss = torch.stack([value.float() for value in losses.values()]).sum()
                found = {name: float(value.detach()) for name, value in losses.items()}
                if not math.isfinite(sum(found.values())):
                    raise NonFiniteLossError(
                        f"{phase}: the loss is not finite at step {step + 1}: {found}",
                        hint="a lower lr (--set lr=…)",
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                if config.clip_grad_norm is not None:
                    parameters = [p for g in optimizer.param_groups for p in g["params"]]
                    nn.utils.clip_grad_norm_(parameters, config.clip_grad_norm)
                optimizer.step()
                for name, value in found.items():
                    sums[name] = sums.get(name, 0.0) + value
                progress(phase, step + 1, steps)
            means = {name: total / per_epoch for name, total in sums.items()}
            rows.append({"epoch": epoch + 1, "lr": config.lr * factor, **means})
            _keep(folder / STATE, identity, trained, optimizer, rows)
    for module in trained:
        module.eval()
    if encoder is not None:
        encoder.requires_grad_(False)
    return rows


@contextmanager
def _repeatable() -> Iterator[None]:
    """Add up in the same order each time.

    Several threads otherwise add to one element, in the backward pass of indexing above all, as
    they happen to come. What CUDA has no such kernel for stays as it is.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


def _groups(module: nn.Module, weight_decay: float, lr_scale: float) -> list[dict[str, Any]]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim > 1]
    spared = [p for p in parameters if p.ndim <= 1]
    return [
        {"params": decayed, "weight_decay": weight_decay, "lr_scale": lr_scale},
        {"params": spared, "weight_decay": 0.0, "lr_scale": lr_scale},
    ]


def _lr_factor(step: int, steps: int, warmup: int) -> float:
    """Learning rate at a step over its peak."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _resume(
    file: Path, identity: str, modules: list[nn.Module], optimizer: torch.optim.Optimizer
) -> list[Row]:
    """Load what an earlier start of the same training left; the rows of its epochs."""
    if not file.is_file():
        return []
    state = torch.load(file, weights_only=True)
    if state["identity"] != identity:
        return []
    for module, weights in zip(modules, state["modules"], strict=True):
        module.load_state_dict(weights)
    optimizer.load_state_dict(state["optimizer"])
    rows: list[Row] = state["rows"]
    logger.info("continues after epoch %d of %s", len(rows), file)
    return rows


def _keep(
    file: Path,
    identity: str,
    modules: list[nn.Module],
    optimizer: torch.optim.Optimizer,
    rows: list[Row],
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".part")
    torch.save(
        {
            "identity": identity,
            "modules": [module.state_dict() for module in modules],
            "optimizer": optimizer.state_dict(),
            "rows": rows,
        },
        aside,
    )
    os.replace(aside, file)
