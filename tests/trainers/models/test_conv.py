"""The convolutional encoder and decoder: shapes, places, and the formulas of their parts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mimray.trainers.config.model import ConvConfig
from mimray.trainers.models import build_encoder
from mimray.trainers.models.conv import ConvDecoder, ConvEncoder, ResidualBlock, conv3x3, group_norm

WIDTHS = (8, 16, 32)


def encoder_of(size: tuple[int, int] = (32, 32), channels: int = 3, depth: int = 1) -> ConvEncoder:
    torch.manual_seed(0)
    encoder = build_encoder(ConvConfig(name="conv", widths=WIDTHS, depth=depth), size, channels)
    assert isinstance(encoder, ConvEncoder)
    stir(encoder)
    return encoder.eval()


def stir(module: torch.nn.Module) -> None:
    """No parameter stays at the value it starts with."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def pictures(size: tuple[int, int], channels: int = 3, count: int = 2) -> Tensor:
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", [(32, 32), (16, 40), (8, 8)])
def test_encoder__says_its_shapes(size: tuple[int, int], channels: int) -> None:
    encoder = encoder_of(size, channels)
    found = encoder(pictures(size, channels))
    grid = size[0] // 8, size[1] // 8

    assert (encoder.width, encoder.stride, encoder.depth) == (32, 8, 3)
    assert (encoder.strides, encoder.widths, encoder.embed_width) == ((2, 4, 8), WIDTHS, 8)
    assert found.grid == grid
    assert found.tokens.shape == (2, math.prod(grid), 32)
    assert found.prefix.shape == (2, 0, 32)
    torch.testing.assert_close(found.pooled, found.tokens.mean(1))


@pytest.mark.parametrize("size", [(24, 32), (64, 8)])
def test_encoder__takes_other_sizes_than_it_was_built_for(size: tuple[int, int]) -> None:
    built, other = encoder_of(size), encoder_of((32, 32))
    torch.testing.assert_close(built(pictures(size)).tokens, other(pictures(size)).tokens)


def test_encoder__refuses_a_size_off_the_stride() -> None:
    with pytest.raises(ValueError, match="36x32 pixels is not a multiple of patch 8"):
        encoder_of()(pictures((36, 32)))


def test_encoder__hides_nothing() -> None:
    with pytest.raises(AssertionError, match="every pixel"):
        encoder_of()(pictures((32, 32)), torch.zeros(2, 16, dtype=torch.bool))


def test_encoder__normalises_each_token_at_the_start() -> None:
    torch.manual_seed(0)
    encoder = ConvEncoder(ConvConfig(name="conv", widths=WIDTHS), (32, 32))
    tokens = encoder(100 * pictures((32, 32))).tokens
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(2, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.var(-1, correction=0), torch.ones(2, 16))


def test_encoder__sees_a_picture_the_same_in_any_batch() -> None:
    encoder, images = encoder_of(), pictures((32, 32), count=5)
    whole = encoder(images).tokens
    assert torch.equal(whole, encoder(images).tokens)
    torch.testing.assert_close(encoder(images[3:4]).tokens, whole[3:4], atol=1e-5, rtol=0)


def test_features__are_the_stages_and_end_in_the_tokens() -> None:
    encoder, images = encoder_of((16, 40)), pictures((16, 40))
    maps = encoder.features(images, (0, 1, 2))
    assert [tuple(m.shape) for m in maps] == [(2, 8, 8, 20), (2, 16, 4, 10), (2, 32, 2, 5)]
    torch.testing.assert_close(maps[2].flatten(2).transpose(1, 2), encoder(images).tokens)

    last, first = encoder.features(images, (-1, 0), norm=False)
    assert torch.equal(first, maps[0])
    assert not torch.allclose(last, maps[2])
    normed = F.layer_norm(last.movedim(1, 3), (32,), encoder.norm.weight, encoder.norm.bias, 1e-6)
    torch.testing.assert_close(normed.movedim(3, 1), maps[2])


def test_features__stop_at_the_last_layer_asked_for() -> None:
    encoder = encoder_of()
    encoder.stages[1].register_forward_hook(lambda *_: pytest.fail("not asked for"))
    encoder.features(pictures((32, 32)), (0,))


def test_encoder__computes_activations_again_where_told_to() -> None:
    encoder, images = encoder_of().train(), pictures((32, 32))
    calls: list[int] = []
    encoder.stages[0].register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = []
    for again in (False, True):
        encoder.activation_checkpointing = again
        encoder.zero_grad()
        encoder(images).tokens.square().mean().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters() if p.grad is not None])
    assert len(calls) == 1 + 2
    assert len(gradients[0]) == len(list(encoder.parameters()))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_residual_block__is_its_formula() -> None:
    torch.manual_seed(0)
    block, x = ResidualBlock(32), torch.randn(2, 32, 5, 7)
    stir(block)
    p = dict(block.named_parameters())
    y = x
    for i in ("1", "2"):
        groups = y.reshape(2, 2, 16 * 5 * 7)  # 16 channels each
        mean, variance = groups.mean(-1, True), groups.var(-1, correction=0, keepdim=True)
        y = ((groups - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
        y = y * p[f"norm{i}.weight"][:, None, None] + p[f"norm{i}.bias"][:, None, None]
        y = F.conv2d(y * torch.sigmoid(y), p[f"conv{i}.weight"], p[f"conv{i}.bias"], padding=1)
    torch.testing.assert_close(block(x), x + y, atol=1e-5, rtol=1e-5)


def test_residual_block__changes_nothing_at_the_start() -> None:
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(ResidualBlock(16)(x), x)


def test_conv3x3__starts_as_for_rectifiers() -> None:
    torch.manual_seed(0)
    conv = conv3x3(32, 64)
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 32)), rel=0.02)
    assert not conv.bias.any()


@pytest.mark.parametrize(
    ("width", "groups"), [(3, 1), (16, 1), (20, 1), (32, 2), (50, 1), (96, 6), (512, 32)]
)
def test_group_norm__has_sixteen_channels_a_group_or_more(width: int, groups: int) -> None:
    assert group_norm(width).num_groups == groups


@pytest.mark.parametrize(
    ("stride", "widths"),
    [
        (8, (16, 8, 8, 4)),
        (14, (16, 8)),
        (14, (16,)),
        (16, (16, 8, 8, 4)),
        (32, (16, 8, 4)),
        (2, (8,)),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_decoder__gives_pictures_of_the_stride(
    stride: int, widths: tuple[int, ...], channels: int
) -> None:
    decoder = ConvDecoder(5, widths, 1, stride=stride, out_chans=channels)
    assert decoder(torch.randn(2, 5, 3, 2)).shape == (2, channels, 3 * stride, 2 * stride)


@pytest.mark.parametrize(("stride", "widths"), [(8, (16, 16, 16, 16)), (14, (16, 16)), (6, (16,))])
def test_decoder__draws_a_latent_where_it_lies(stride: int, widths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    decoder = ConvDecoder(4, widths, 1, stride=stride, out_chans=3)
    latent = torch.randn(8, 4, 7, 9)
    other = latent.clone()
    other[:, :, 2, 6] += 0.1 * torch.randn(8, 4)
    change = (decoder(other) - decoder(latent)).square().sum(dim=(0, 1))  # H W
    share = F.avg_pool2d(change[None], stride)[0] / change.mean() / (7 * 9)  # h w
    rows, columns = torch.meshgrid(torch.arange(7), torch.arange(9), indexing="ij")
    assert (share * rows).sum().item() == pytest.approx(2, abs=0.5)
    assert (share * columns).sum().item() == pytest.approx(6, abs=0.5)


@pytest.mark.parametrize(("stride", "widths"), [(8, (16, 16)), (7, (16,)), (4, (16, 8, 8))])
def test_decoder__starts_without_a_checkerboard(stride: int, widths: tuple[int, ...]) -> None:
    shuffle = stride // 2 ** (len(widths) - 1)
    decoder = ConvDecoder(4, widths, 1, stride=stride, out_chans=3)
    pixels = decoder(torch.randn(1, 4, 3, 2))
    coarse = pixels[..., ::shuffle, ::shuffle]
    torch.testing.assert_close(
        pixels, coarse.repeat_interleave(shuffle, 2).repeat_interleave(shuffle, 3)
    )
    assert coarse.std(dim=(2, 3)).min() > 0
