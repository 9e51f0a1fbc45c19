"""How much faster an encoder is that sees only what is not masked."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from mimray.trainers.config.base import Config

if TYPE_CHECKING:
    from mimray.trainers.config.run import Recipe

# Times faster, as it is often put.
QUOTED = {0.15: 1.0, 0.5: 2.0, 0.75: 4.0, 0.9: 10.0}
_MOST_ROWS = 12


class SpeedRow(Config):
    """Times faster than the full sequence at a mask ratio.

    Attributes:
        mask_ratio: share hidden.
        bound: by the number of tokens; None where nothing is left to see.
        measured: forward and backward of the encoder; None where it was not measured.
        quoted: in the table that is often quoted; None where it has no such row.
        searched: whether a trial tried it.
    """

    mask_ratio: float
    bound: float | None
    measured: float | None
    quoted: float | None
    searched: bool


def token_bound(mask_ratio: float, num_patches: int | None = None) -> float:
    """The ratio of sequence lengths, full over visible: no encoder gains more from its blocks.

    Args:
        mask_ratio: share hidden.
        num_patches: of a picture, counted with the class token; without it the limit for many.

    Returns:
        Times faster; infinite where nothing is left to see.
    """
    if num_patches is None:
        return 1 / (1 - mask_ratio) if mask_ratio < 1 else math.inf
    return (num_patches + 1) / (int(num_patches * (1 - mask_ratio)) + 1)


def speed_rows(searched: Sequence[float], measured: Mapping[float, float]) -> list[SpeedRow]:
    """The table of speeds: what was quoted, measured, and searched if that is not too much.

    Args:
        searched: mask ratios of trials.
        measured: times faster by mask ratio.
    """
    listed = set(searched) if len(set(searched)) <= _MOST_ROWS else set()
    rows = []
    for ratio in sorted({*QUOTED, *measured, *listed}):
        bound = token_bound(ratio)
        rows.append(
            SpeedRow(
                mask_ratio=ratio,
                bound=bound if math.isfinite(bound) else None,
                measured=measured.get(ratio),
                quoted=QUOTED.get(ratio),
                searched=ratio in searched,
            )
        )
    return rows


def encoder_speed(
    recipe: Recipe, mask_ratios: Sequence[float], *, batch: int = 16, rounds: int = 3
) -> dict[float, float]:
    """Measure forward and backward of a recipe's encoder on visible tokens, on this machine.

    Args:
        recipe: whose encoder and image size are taken.
        mask_ratios: to measure.
        batch: pictures at once.
        rounds: of which the median is taken.

    Returns:
        Times faster than the full sequence, by mask ratio; empty where the method's encoder sees
        mask tokens in place of what is hidden, which saves it nothing.
    """
    if not recipe.method.drops_hidden:
        return {}
    seconds = encoder_seconds(recipe, mask_ratios, batch=batch, rounds=rounds)
    return {
        ratio: statistics.median(
            full / visible for full, visible in zip(seconds[0.0], seconds[ratio], strict=True)
        )
        for ratio in mask_ratios
    }


def encoder_seconds(
    recipe: Recipe, mask_ratios: Sequence[float], *, batch: int, rounds: int
) -> dict[float, list[float]]:
    """Time the encoder at each mask ratio, taking turns so that all see the same machine.

    Args:
        recipe: whose encoder and image size are taken.
        mask_ratios: to measure; 0, the full sequence, is measured in any case.
        batch: pictures at once.
        rounds: how many times each is timed, after one that warms up.

    Returns:
        Seconds of each round by mask ratio; 0 is the full sequence.
    """
    import torch

    # Training goes on in the same process; its random numbers are not to notice.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        steps = _encoder_steps(recipe, mask_ratios, batch)
        for step in steps.values():
            step()
        seconds: dict[float, list[float]] = {ratio: [] for ratio in steps}
        for _ in range(rounds):
            for ratio, step in steps.items():
                began = time.perf_counter()
                step()
                seconds[ratio].append(time.perf_counter() - began)
    return seconds


def _encoder_steps(
    recipe: Recipe, mask_ratios: Sequence[float], batch: int
) -> dict[float, Callable[[], None]]:
    """Forward and backward by mask ratio; 0 is the full sequence."""
    import numpy as np
    import torch

    from mimray.trainers.data.masks import random_mask
    from mimray.trainers.models import build_encoder

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, channels = recipe.data.image_size, recipe.data.channels
    encoder = build_encoder(recipe.encoder, size, channels).to(device).train()
    images = torch.randn(batch, channels, *size, device=device)
    rng = np.random.default_rng(0)

    def step_at(mask_ratio: float) -> Callable[[], None]:
        mask = None
        if mask_ratio:
            drawn = [random_mask(rng, recipe.grid, mask_ratio) for _ in range(batch)]
            mask = torch.from_numpy(np.stack(drawn)).to(device)

        def step() -> None:
            encoder.zero_grad(set_to_none=True)
            encoder(images, mask).tokens.square().mean().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return step

    return {ratio: step_at(ratio) for ratio in dict.fromkeys((0.0, *mask_ratios))}
