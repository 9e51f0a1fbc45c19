from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import roi_align

from mimray.trainers.bundles import FrozenEncoder
from mimray.trainers.errors import ConfigError
from mimray.trainers.evaluation.detection.anchors import StrideAnchors, anchor_sizes_of, region_pool
from mimray.trainers.evaluation.detection.pyramid import SimplePyramid, build_pyramid, choose_layers


@pytest.mark.parametrize(
    ("patch_size", "finest", "strides"),
    [
        (4, 4, (4, 8, 16, 32)),
        (8, 4, (4, 8, 16, 32)),
        (14, 4, (3.5, 7, 14, 28)),
        (16, 4, (4, 8, 16, 32)),
        (32, 4, (4, 8, 16, 32)),
        (8, 8, (8, 16, 32, 64)),
        (16, 8, (8, 16, 32, 64)),
    ],
)
def test_vit_levels__have_the_strides_they_name(
    vit: Callable[..., FrozenEncoder], patch_size: int, finest: int, strides: tuple[float, ...]
) -> None:
    encoder = vit(patch_size)
    layers = choose_layers(encoder, None, finest)
    assert layers == (1,)
    pyramid = build_pyramid(encoder, layers, finest, 8)
    assert pyramid.strides == strides
    rows, columns = 3 * patch_size, 5 * patch_size
    levels = pyramid(encoder.features(torch.zeros(2, 3, rows, columns), layers))
    for stride, level in zip(strides, levels, strict=True):
        assert level.shape == (2, 8, np.ceil(rows / stride), np.ceil(columns / stride))


@pytest.mark.parametrize(("finest", "layers"), [(4, (0, 1, 2, 3)), (8, (1, 2, 3))])
def test_swin_levels__are_its_stages(
    swin: FrozenEncoder, finest: int, layers: tuple[int, ...]
) -> None:
    assert choose_layers(swin, None, finest) == layers
    pyramid = build_pyramid(swin, layers, finest, 8)
    assert pyramid.strides == tuple(finest * 2**level for level in range(4))
    levels = pyramid(swin.features(torch.zeros(1, 3, 64, 96), layers))
    for stride, level in zip(pyramid.strides, levels, strict=True):
        assert level.shape == (1, 8, np.ceil(64 / stride), np.ceil(96 / stride))


def test_level__stays_in_place() -> None:
    # A spot in the map must appear at the same place of every level.
    torch.manual_seed(0)
    pyramid = SimplePyramid([4], 16, 4, 8).eval()
    spot, blank = torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8)
    spot[..., 6, 2] = 1
    for stride, lit, dark in zip(pyramid.strides, pyramid([spot]), pyramid([blank]), strict=True):
        rows, columns = np.nonzero((lit - dark)[0].abs().sum(0).detach().numpy() > 1e-7)
        # The 3x3 convolution reaches a cell further, a pooled level holds a neighbour too.
        for places, first in ((rows, 6), (columns, 2)):
            centre = (places.min() + places.max() + 1) / 2 * stride
            assert abs(centre - (first + 0.5) * 16) <= stride


def test_layers__several_of_a_vit_lie_side_by_side(vit: Callable[..., FrozenEncoder]) -> None:
    encoder = vit(8)
    layers = choose_layers(encoder, (0, -1), 4)
    assert layers == (0, 1)
    pyramid = build_pyramid(encoder, layers, 4, 8)
    assert len(pyramid(encoder.features(torch.zeros(1, 3, 16, 16), layers))) == 4


def test_layers__that_make_no_pyramid_are_refused() -> None:
    encoder: Any = SimpleNamespace(
        depth=4, strides=(4, 8, 16, 32), widths=(8,) * 4, card=SimpleNamespace(layers=())
    )
    with pytest.raises(ConfigError, match=r"strides \[4, 16\]"):
        choose_layers(encoder, (0, 2), 4)
    with pytest.raises(ConfigError, match=r"layers \[4\]: there are 0 to 3"):
        choose_layers(encoder, (4,), 4)


def test_anchors__are_torchvisions_moved_to_the_cells_centres() -> None:
    maps = [torch.zeros(2, 1, 6, 10), torch.zeros(2, 1, 3, 5)]
    ours = StrideAnchors([[16.0], [32.0]], (8, 16))(None, maps)
    theirs = AnchorGenerator(((16,), (32,)), ((0.5, 1.0, 2.0),) * 2)(
        ImageList(torch.zeros(2, 3, 48, 80), [(48, 80)] * 2), maps
    )
    assert len(ours) == 2
    shift = torch.cat([torch.full((6 * 10 * 3, 1), 4.0), torch.full((3 * 5 * 3, 1), 8.0)])
    assert torch.equal(ours[0], theirs[0] + shift)


def test_anchors__of_strides_that_are_no_whole_numbers_do_not_drift() -> None:
    anchors = StrideAnchors([[16.0]], (3.5,))(None, [torch.zeros(1, 1, 4, 40)])[0]
    centres = (anchors[:, 0] + anchors[:, 2]) / 2
    assert centres.max() == 39.5 * 3.5


def test_anchor_sizes__follow_the_boxes_within_bounds() -> None:
    sides = np.linspace(10, 110, 101)
    boxes = np.stack([0 * sides, 0 * sides, sides / 2, sides * 2], axis=1)
    assert anchor_sizes_of(boxes) == (20, 40, 80, 160)
    assert anchor_sizes_of(boxes / 10) == (8, 16, 32, 64)
    assert anchor_sizes_of(boxes * 10) == (32, 64, 128, 256)


def test_regions__are_cut_by_the_true_stride() -> None:
    levels = {str(i): torch.rand(1, 2, s, s) for i, s in enumerate((32, 16, 8, 4))}
    strides = (3.5, 7.0, 14.0, 28.0)
    small, large = torch.tensor([[10.0, 20.0, 60.0, 50.0]]), torch.tensor([[0.0, 0, 112, 112]])
    found = region_pool(strides, 7)(levels, [torch.cat([small, large])], [(112, 112)])
    for box, level, region in ((small, 0, found[0]), (large, 1, found[1])):
        wanted = roi_align(
            levels[str(level)], [box], 7, spatial_scale=1 / strides[level], sampling_ratio=2
        )
        assert torch.allclose(region, wanted[0])
