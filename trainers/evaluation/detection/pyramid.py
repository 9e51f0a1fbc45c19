"""Feature pyramids over an encoder's maps: the levels that a detector works on."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork

from mimray.trainers.config.evaluation.detection import NUM_LEVELS
from mimray.trainers.errors import ConfigError
from mimray.trainers.evaluation.features.encoders import FeatureEncoder, chosen_layers


class Pyramid(nn.Module, ABC):
    """Maps of an encoder in, `NUM_LEVELS` maps of one width out, each of half the last one's size.

    Attributes:
        width: channels of each level.
        strides: pixels of the input between neighbours of each level, finest first. A level's
            cell i covers [i, i + 1) strides, so the last one may reach beyond the input.
    """

    def __init__(self, width: int, strides: Sequence[float]) -> None:
        super().__init__()
        self.width, self.strides = width, tuple(strides)

    @abstractmethod
    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Levels [B, width, h, w] of maps [B, D, h, w]."""


class SimplePyramid(Pyramid):
    """Levels made from maps of one stride, each by itself: deconvolved, as is, or pooled.

    Strides are the powers of two of the encoder's that come closest to the finest one wanted and
    its doubles: 4, 8, 16, 32 for patches of 4, 8, 16 or 32; 3.5, 7, 14, 28 for patches of 14.

    Args:
        in_widths: channels of each map; several are laid side by side.
        stride: stride of all maps, pixels.
        finest: stride wanted of the first level, pixels.
        width: channels of each level.

    Source: Li et al. 2022 (ViTDet), sec. 3, and its published code for norms and activations.
    """

    def __init__(self, in_widths: Sequence[int], stride: int, finest: int, width: int) -> None:
        most = round(math.log2(stride / finest))
        doublings = [most - level for level in range(NUM_LEVELS)]
        super().__init__(width, [stride / 2**count for count in doublings])
        self.branches = nn.ModuleList(_branch(sum(in_widths), n, width) for n in doublings)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Levels of maps of one size."""
        whole = maps[0] if len(maps) == 1 else torch.cat(list(maps), dim=1)
        return [branch(whole) for branch in self.branches]


class StagePyramid(Pyramid):
    """Levels made from stages of falling resolution, joined from the top down.

    Where there are fewer stages than levels, the last one is thinned out to go on.

    Args:
        in_widths: channels of each stage's map.
        strides: stride of each stage, pixels; each twice the last.
        width: channels of each level.

    Source: Lin et al. 2017 (FPN), sec. 3 and, for the further level, footnote 2 of sec. 4.1.
    """

    def __init__(self, in_widths: Sequence[int], strides: Sequence[int], width: int) -> None:
        super().__init__(width, [strides[0] * 2.0**level for level in range(NUM_LEVELS)])
        self.fpn = FeaturePyramidNetwork(list(in_widths), width, norm_layer=LayerNorm2d)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Levels of maps, finest first."""
        levels = list(self.fpn({str(i): level for i, level in enumerate(maps)}).values())
        while len(levels) < NUM_LEVELS:
            levels.append(F.max_pool2d(levels[-1], kernel_size=1, stride=2))
        return levels


def choose_layers(
    encoder: FeatureEncoder, asked: tuple[int, ...] | None, finest: int
) -> tuple[int, ...]:
    """Layers that a pyramid is made of, counted from 0.

    Args:
        encoder: encoder that gives the maps.
        asked: layers that the user named; None takes the last layer where all have one stride, as a
            ViT's have, and otherwise the stages from the finest stride wanted on.
        finest: stride wanted of the first level, pixels.

    Raises:
        ConfigError: there is no such layer, or the strides of those make no pyramid.
    """
    strides = encoder.strides
    if asked is None:
        if len(set(strides)) == 1:
            return (encoder.depth - 1,)
        fine = [layer for layer in range(encoder.depth) if strides[layer] >= finest]
        return tuple(fine[:NUM_LEVELS])
    layers = chosen_layers(encoder, asked)
    found = [strides[layer] for layer in layers]
    doubles = all(b == 2 * a for a, b in zip(found, found[1:], strict=False))
    if len(set(found)) > 1 and not (doubles and len(found) <= NUM_LEVELS):
        raise ConfigError(
            f"layers {list(asked)} have strides {found}",
            hint=f"all of one stride, or up to {NUM_LEVELS} of which each doubles the last",
        )
    return layers


def build_pyramid(
    encoder: FeatureEncoder, layers: Sequence[int], finest: int, width: int
) -> Pyramid:
    """The pyramid that suits an encoder's layers.

    Args:
        encoder: encoder that gives the maps.
        layers: layers, as `choose_layers` gives them.
        finest: stride wanted of the first level, pixels.
        width: channels of each level.
    """
    widths = [encoder.widths[layer] for layer in layers]
    strides = [encoder.strides[layer] for layer in layers]
    if len(set(strides)) == 1:
        return SimplePyramid(widths, strides[0], finest, width)
    return StagePyramid(widths, strides, width)


def _branch(channels: int, doublings: int, width: int) -> nn.Sequential:
    """Doubles or halves a map's resolution so many times, then brings it to the width."""
    steps: list[nn.Module] = []
    for number in range(doublings):
        if number:
            steps += [LayerNorm2d(channels), nn.GELU()]
        steps.append(nn.ConvTranspose2d(channels, channels // 2, 2, stride=2))
        channels //= 2
    steps += [nn.MaxPool2d(2, ceil_mode=True) for _ in range(-doublings)]
    return nn.Sequential(
        *steps,
        nn.Conv2d(channels, width, 1, bias=False),
        LayerNorm2d(width),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        LayerNorm2d(width),
    )
