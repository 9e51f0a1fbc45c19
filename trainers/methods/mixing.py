"""Mixup and CutMix: pictures of a batch blended in pairs, and their targets with them."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mimray.trainers.config.method import FinetuneConfig


def mix(
    rng: np.random.Generator,
    images: Float[Tensor, "B C H W"],
    targets: Float[Tensor, "B K"],
    config: FinetuneConfig,
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
    """Blend each picture with its opposite in the batch, all by one share, or leave all as is.

    Args:
        rng: the generator of all choices: to mix or not, mixup or CutMix, share and box.
        images: normalised pictures; not changed in place.
        targets: class probabilities.
        config: the method's configuration, with `mixup`, `cutmix` and their probabilities.

    Returns:
        Blended pictures and targets. The share of CutMix is that of the area actually replaced.

    Source: Zhang et al. 2018 (mixup), sec. 2; Yun et al. 2019 (CutMix), eq. 1 and 2; one share a
        batch, and partners back to front, as timm's `Mixup(mode="batch")`, by which MAE fine-tunes.
    """
    if not (config.mixup or config.cutmix) or rng.random() >= config.mixup_prob:
        return images, targets
    cutmix = bool(config.cutmix) and (
        not config.mixup or bool(rng.random() < config.mixup_switch_prob)
    )
    alpha = config.cutmix if cutmix else config.mixup
    kept = float(rng.beta(alpha, alpha))
    opposite = images.flip(0)
    if cutmix:
        height, width = images.shape[2:]
        rows, columns = _box(rng, (height, width), math.sqrt(1 - kept))
        images = images.clone()
        images[:, :, rows, columns] = opposite[:, :, rows, columns]
        replaced = (rows.stop - rows.start) * (columns.stop - columns.start)
        kept = 1 - replaced / (height * width)
    else:
        images = images * kept + opposite * (1 - kept)
    return images, targets * kept + targets.flip(0) * (1 - kept)


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
