"""Anchors and regions of a detector, placed by the true strides of each level.

torchvision guesses strides from the sizes of maps and takes them for powers of two, which is
wrong for patches of 14 pixels and for levels that reach beyond the input.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from mimray.trainers.config.evaluation.detection import NUM_LEVELS

RATIOS = (0.5, 1.0, 2.0)
# Of the first level's anchors, pixels of the input: as in FPN at most, and large enough to be one
# of several cells at least.
_SMALLEST_PX = (8.0, 32.0)
# So many of the training boxes are smaller than the first level's anchors.
_SMALLER_SHARE = 0.1


def anchor_sizes_of(boxes: np.ndarray) -> tuple[float, ...]:
    """Sides of square anchors, one a level, each twice the last.

    The first is the tenth percentile of the boxes' sides (roots of their areas) but lies within
    8 and 32 pixels.

    Args:
        boxes: float64 [N, 4] of training objects in the input, pixels.
    """
    sides = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    first = float(np.quantile(sides, _SMALLER_SHARE).clip(*_SMALLEST_PX))
    return tuple(round(first * 2**level, 1) for level in range(NUM_LEVELS))


class StrideAnchors(AnchorGenerator):  # type: ignore[misc]  # torchvision has no types
    """Anchors around the centre of each cell.

    Args:
        sizes: sides of the anchors of each level, pixels of the input; several a level are allowed.
        strides: stride of each level, pixels.
    """

    def __init__(self, sizes: Sequence[Sequence[float]], strides: Sequence[float]) -> None:
        super().__init__(tuple(map(tuple, sizes)), (RATIOS,) * len(sizes))
        self._strides = tuple(strides)

    def forward(self, image_list: object, feature_maps: Sequence[Tensor]) -> list[Tensor]:
        """Anchors [A, 4] of each picture; the same for all."""
        self.set_cell_anchors(feature_maps[0].dtype, feature_maps[0].device)
        levels = []
        for stride, anchors, level in zip(
            self._strides, self.cell_anchors, feature_maps, strict=True
        ):
            rows, columns = (
                (torch.arange(side, dtype=anchors.dtype, device=anchors.device) + 0.5) * stride
                for side in level.shape[-2:]
            )
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            centres = torch.stack([x, y, x, y], dim=-1).view(-1, 1, 4)  # cells 1 4
            levels.append((centres + anchors).view(-1, 4))
        return [torch.cat(levels)] * feature_maps[0].shape[0]


def region_pool(strides: Sequence[float], output_size: int) -> MultiScaleRoIAlign:
    """Cuts regions out of the level that suits their size.

    Args:
        strides: stride of each level, pixels.
        output_size: cells along a region's side.

    Source: He et al. 2017, sec. 3 (RoIAlign); Lin et al. 2017, eq. 1, for the level.
    """
    names = [str(level) for level in range(len(strides))]
    pool = MultiScaleRoIAlign(names, output_size, sampling_ratio=2)
    pool.scales = [1 / stride for stride in strides]
    finest = round(np.log2(strides[0]))
    pool.map_levels = initLevelMapper(finest, finest + len(strides) - 1)
    return pool
