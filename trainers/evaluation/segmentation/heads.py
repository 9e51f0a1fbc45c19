"""Heads that turn an encoder's maps into logits of each class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Strides in pixels that a pyramid over maps of one stride comes close to.
_FINEST_STRIDE = 4
# Sides of the grids that pyramid pooling averages over.
_POOLED_SIDES = (1, 2, 3, 6)
_DROPOUT = 0.1
# Channels normalised together: enough of them for maps pooled to one place.
_GROUP_WIDTH = 16


def build_head(
    kind: Literal["linear", "fpn", "upernet"],
    *,
    widths: Sequence[int],
    strides: Sequence[int],
    num_classes: int,
    head_width: int,
) -> nn.Module:
    """A head that takes maps [B, D, h, w], a layer each, and gives logits [B, K, h, w].

    Args:
        kind: kind of head, see `SegmentationConfig.head`.
        widths: channels of each layer's map.
        strides: stride of each layer's map, pixels.
        num_classes: K.
        head_width: channels inside of a pyramid.
    """
    if kind == "linear":
        return LinearHead(widths, num_classes)
    return PyramidHead(widths, strides, num_classes, head_width, pooling=kind == "upernet")


class LinearHead(nn.Module):
    """Batch norm and a 1x1 convolution over all maps, side by side at the finest one's stride.

    Source: the linear evaluation of Oquab et al. 2023 (DINOv2), sec. 7.4, with several layers as
        in its `+ms` variant.
    """

    def __init__(self, widths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(sum(widths))
        self.classify = nn.Conv2d(sum(widths), num_classes, 1)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.zeros_(cast(Tensor, self.classify.bias))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits [B, K, h, w] at the finest map's resolution."""
        return cast(Tensor, self.classify(self.norm(side_by_side(maps))))


class PyramidHead(nn.Module):
    """A top-down feature pyramid, fused at its finest level.

    Maps of different strides, as a Swin's stages, are its levels as they are. Maps of one stride,
    as a ViT's layers, are first brought to strides of about 4, 8, 16 and 32 pixels.

    Source: Xiao et al. 2018, "Unified Perceptual Parsing for Scene Understanding", sec. 3.1, with
        the pooling of Zhao et al. 2017 (PSPNet) on the top level; without it, Lin et al. 2017
        (FPN). Rescaling of a ViT's layers as Bao et al. 2022 (BEiT), sec. 3.2. Group norm (Wu and
        He 2018) inside in place of batch norm, since batches are small.

    Args:
        widths: channels of each map, finest level first.
        strides: stride of each map, pixels.
        num_classes: K.
        width: channels of the pyramid.
        pooling: pool the top level over grids of several sizes.
    """

    def __init__(
        self,
        widths: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        width: int,
        *,
        pooling: bool,
    ) -> None:
        super().__init__()
        plain = len(set(strides)) == 1
        self.rescale = nn.ModuleList(
            _rescaled(channels, stride, _FINEST_STRIDE * 2**level) if plain else nn.Identity()
            for level, (channels, stride) in enumerate(zip(widths, strides, strict=True))
        )
        self.laterals = nn.ModuleList(_convolved(channels, width, 1) for channels in widths)
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), _convolved(width, width, 1))
            for side in (_POOLED_SIDES if pooling else ())
        )
        self.pooled = _convolved(width * (1 + len(self.pools)), width, 3) if pooling else None
        self.smooth = nn.ModuleList(_convolved(width, width, 3) for _ in widths)
        self.fuse = _convolved(width * len(widths), width, 3)
        self.classify = nn.Sequential(nn.Dropout2d(_DROPOUT), nn.Conv2d(width, num_classes, 1))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits [B, K, h, w] at the finest level's resolution."""
        levels = [
            lateral(rescale(level))
            for level, rescale, lateral in zip(maps, self.rescale, self.laterals, strict=True)
        ]
        if self.pooled is not None:
            top = levels[-1]
            levels[-1] = self.pooled(side_by_side([top, *(pool(top) for pool in self.pools)]))
        for lower in range(len(levels) - 2, -1, -1):
            levels[lower] = levels[lower] + _resized(levels[lower + 1], levels[lower])
        levels = [smooth(level) for smooth, level in zip(self.smooth, levels, strict=True)]
        return cast(Tensor, self.classify(self.fuse(side_by_side(levels))))


def _rescaled(channels: int, stride: int, wanted: int) -> nn.Sequential:
    """Double or halve a map's resolution until its stride is closest to the one wanted."""
    doublings = round(math.log2(stride / wanted))
    steps: list[nn.Module] = []
    for number in range(doublings):
        if number:
            steps += [_norm(channels), nn.GELU()]
        steps.append(nn.ConvTranspose2d(channels, channels, 2, stride=2))
    steps += [nn.MaxPool2d(2, ceil_mode=True) for _ in range(-doublings)]
    return nn.Sequential(*steps)


def _convolved(channels: int, width: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False),
        _norm(width),
        nn.ReLU(),
    )


def _norm(channels: int) -> nn.GroupNorm:
    groups = channels // _GROUP_WIDTH if channels % _GROUP_WIDTH == 0 else 1
    return nn.GroupNorm(groups, channels)


def side_by_side(maps: Sequence[Tensor]) -> Tensor:
    """All maps at the first one's resolution, along the channels."""
    return torch.cat([_resized(level, maps[0]) for level in maps], dim=1)


def _resized(level: Tensor, like: Tensor) -> Tensor:
    if level.shape[-2:] == like.shape[-2:]:
        return level
    return F.interpolate(level, like.shape[-2:], mode="bilinear", align_corners=False)
