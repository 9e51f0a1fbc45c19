"""Mixup and CutMix: pictures blended with a partner, and their targets with them."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mimray.trainers.config.finetune import FinetuneConfig


def draw_mixing(
    rng: np.random.Generator, config: FinetuneConfig, size: tuple[int, int]
) -> Float[np.ndarray, 5]:
    """Draw how a picture is mixed: not at all, by mixup or by CutMix, and by which share or box.

    Args:
        rng: the picture's own generator.
        config: the method's configuration, with `mixup`, `cutmix` and their probabilities.
        size: (height, width) of the picture, pixels.

    Returns:
        The share of the picture's own pixels outside the box; the box that its partner's pixels
        fill, its first row, the row after its last, first column and column after its last.

    Source: Zhang et al. 2018 (mixup), sec. 2; Yun et al. 2019 (CutMix), eq. 1 and 2; draws a
        picture as timm's `Mixup(mode="elem")`, so that they depend on no batch. MAE fine-tunes
        by its mode `batch`, one draw for all pictures.
    """
    unmixed = np.array([1.0, 0, 0, 0, 0])
    if rng.random() >= config.mixup_prob:
        return unmixed
    cutmix = bool(config.cutmix) and (
        not config.mixup or bool(rng.random() < config.mixup_switch_prob)
    )
    alpha = config.cutmix if cutmix else config.mixup
    kept = float(rng.beta(alpha, alpha))
    if not cutmix:
        return np.array([kept, 0, 0, 0, 0])
    rows, columns = _box(rng, size, math.sqrt(1 - kept))
    return np.array([1.0, rows.start, rows.stop, columns.start, columns.stop])


def mix(
    images: Float[Tensor, "B C H W"],
    targets: Float[Tensor, "B K"],
    mixing: Float[Tensor, "B 5"],
    partners: Int64[Tensor, " M"],
) -> tuple[Float[Tensor, "M C H W"], Float[Tensor, "M K"]]:
    """Blend each of the first M pictures with its partner, and their targets alike.

    Args:
        images: normalised pictures; not changed in place.
        targets: class probabilities.
        mixing: the result of `draw_mixing` for each picture.
        partners: the row of each one's partner.

    Returns:
        Blended pictures and targets. The share of CutMix is that of the area actually replaced.
    """
    (height, width), count = images.shape[2:], len(partners)
    kept, top, bottom, left, right = mixing[:count, :, None].unbind(dim=1)  # M 1 each
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    inside_rows, inside_columns = (
        (rows >= top) & (rows < bottom),  # M H
        (columns >= left) & (columns < right),  # M W
    )
    inside = (inside_rows[:, :, None] & inside_columns[:, None, :]).unsqueeze(1)  # M 1 H W
    others, share = images[partners], kept[:, :, None, None]
    blended = images[:count] * share + others * (1 - share)
    kept = kept * (1 - (bottom - top) * (right - left) / (height * width))  # M 1
    return (
        torch.where(inside, others, blended),
        targets[:count] * kept + targets[partners] * (1 - kept),
    )


def smoothed_targets(
    labels: Int64[Tensor, " B"], num_classes: int, smoothing: float
) -> Float[Tensor, "B K"]:
    """Label smoothing: `smoothing` is spread evenly over all classes, the rest is the label's.

    Source: Szegedy et al. 2016 ("Rethinking the Inception Architecture"), sec. 7.
    """
    spread = torch.full((len(labels), num_classes), smoothing / num_classes, device=labels.device)
    peak = 1 - smoothing + smoothing / num_classes
    return spread.scatter(1, labels.unsqueeze(1), peak)


def _box(rng: np.random.Generator, size: tuple[int, int], share: float) -> tuple[slice, slice]:
    """Rows and columns of a box of `share` of each side around a random pixel, cut at the edges."""
    spans = [int(side * share) for side in size]
    centres = [int(rng.integers(side)) for side in size]
    rows, columns = (
        slice(max(0, centre - span // 2), min(side, centre + (span + 1) // 2))
        for side, span, centre in zip(size, spans, centres, strict=True)
    )
    return rows, columns
