from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mimray.trainers.bundles import FrozenEncoder
from mimray.trainers.config.evaluation.segmentation import SegmentationConfig
from mimray.trainers.errors import ConfigError
from mimray.trainers.evaluation.features.encoders import chosen_layers
from mimray.trainers.evaluation.segmentation.heads import build_head
from mimray.trainers.evaluation.segmentation.segmenter import build_segmenter
from mimray.trainers.evaluation.segmentation.task import masked_cross_entropy

VOID = 255


def _maps(widths: list[int], strides: list[int], size: tuple[int, int]) -> list[torch.Tensor]:
    return [
        torch.randn(2, width, size[0] // stride, size[1] // stride)
        for width, stride in zip(widths, strides, strict=True)
    ]


@pytest.mark.parametrize("kind", ["linear", "fpn", "upernet"])
@pytest.mark.parametrize(
    ("widths", "strides", "finest"),
    [
        ([24] * 4, [16] * 4, 4),
        ([24] * 4, [8] * 4, 4),
        ([24] * 4, [14] * 4, 3.5),
        ([12, 24, 48, 96], [4, 8, 16, 32], 4),
        ([24], [16], 4),
    ],
)
def test_heads__logits_at_the_finest_stride(
    kind: Any, widths: list[int], strides: list[int], finest: float
) -> None:
    size = (4 * strides[-1], 6 * strides[-1])
    head = build_head(kind, widths=widths, strides=strides, num_classes=5, head_width=16)
    logits = head(_maps(widths, strides, size))
    stride = min(strides) if kind == "linear" else finest
    assert logits.shape == (2, 5, round(size[0] / stride), round(size[1] / stride))
    logits.sum().backward()
    assert all(p.grad is not None for p in head.parameters()), "every parameter is used"


@pytest.mark.parametrize("kind", ["fpn", "upernet"])
def test_heads__an_odd_grid_and_one_picture(kind: Any) -> None:
    head = build_head(kind, widths=[24] * 4, strides=[16] * 4, num_classes=3, head_width=16)
    logits = head([torch.randn(1, 24, 1, 3) for _ in range(4)])  # in training mode
    assert logits.shape == (1, 3, 4, 12)


def test_linear_head__is_batch_norm_and_a_1x1_convolution() -> None:
    head = build_head("linear", widths=[3, 2], strides=[8, 8], num_classes=4, head_width=1).eval()
    with torch.no_grad():
        head.norm.running_mean.copy_(torch.arange(5.0))
        head.norm.running_var.copy_(torch.arange(1.0, 6.0))
    one, other = torch.randn(1, 3, 2, 2), torch.randn(1, 2, 2, 2)
    x = torch.cat([one, other], dim=1)[0].flatten(1)  # D N
    x = (x - torch.arange(5.0)[:, None]) / (torch.arange(1.0, 6.0)[:, None] + 1e-5).sqrt()
    expected = head.classify.weight[:, :, 0, 0] @ x + head.classify.bias[:, None]
    torch.testing.assert_close(head([one, other])[0].flatten(1), expected)


def test_segmenter__takes_the_layers_that_there_are(
    make_vit: Callable[[], FrozenEncoder], make_swin: Callable[[], FrozenEncoder]
) -> None:
    vit = make_vit()
    assert chosen_layers(vit, None) == (0, 1, 2, 3)
    assert chosen_layers(vit, (-1, 0)) == (3, 0)
    with pytest.raises(ConfigError, match=r"layers \[4\]: there are 0 to 3"):
        chosen_layers(vit, (4,))
    for encoder in (vit, make_swin()):
        model = build_segmenter(
            encoder,
            SegmentationConfig(head="fpn", head_width=8),
            ("a", "b", "c"),
            (32, 32),
            device="cpu",
            seed=0,
        )
        model.head.eval()
        assert model.logits(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape[:2] == (1, 3)


def test_loss__void_has_no_part_in_it() -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    labels = torch.randint(0, 3, (2, 4, 4))
    labels[:, 1:3] = VOID
    loss = masked_cross_entropy(logits, labels, VOID)
    known = labels != VOID
    rows = logits.permute(0, 2, 3, 1)[known]
    expected = -rows.log_softmax(dim=1)[torch.arange(len(rows)), labels[known]].mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert logits.grad is not None
    assert (logits.grad[:, :, 1:3] == 0).all()
    assert (logits.grad[:, :, :1] != 0).all()


def test_loss__of_nothing_but_void_is_zero() -> None:
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = masked_cross_entropy(logits, torch.full((1, 4, 4), VOID), VOID)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()
