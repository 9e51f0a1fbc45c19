"""Cross-attention against torch's own, and the queries' independence of one another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimray.trainers.models.cross_attention import CrossAttention, CrossBlock
from mimray.trainers.models.vit import init_transformer

WIDTH, CONTEXT, HEADS = 24, 20, 3


def block() -> CrossBlock:
    """A block with weights, biases and norms that all matter."""
    torch.manual_seed(0)
    made = CrossBlock(WIDTH, CONTEXT, HEADS)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return made.eval()


def tokens(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(2, count, width, generator=torch.Generator().manual_seed(seed))


def as_torchs(ours: CrossAttention) -> nn.MultiheadAttention:
    """torch's module with the same weights."""
    theirs = nn.MultiheadAttention(WIDTH, HEADS, kdim=CONTEXT, vdim=CONTEXT, batch_first=True)
    keys, values = ours.kv.weight.chunk(2)
    theirs.load_state_dict(
        {
            "q_proj_weight": ours.q.weight,
            "k_proj_weight": keys,
            "v_proj_weight": values,
            "in_proj_bias": torch.cat([ours.q.bias, ours.kv.bias]),
            "out_proj.weight": ours.proj.weight,
            "out_proj.bias": ours.proj.bias,
        }
    )
    return theirs.eval()


@torch.no_grad()
def test_a_block__equals_torchs_attention_and_a_pre_norm_mlp():
    ours = block()
    queries, context = tokens(5, WIDTH, 1), tokens(7, CONTEXT, 2)
    weights = dict(ours.named_parameters())

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    attended, _ = as_torchs(ours.attn)(norm(queries, "norm1"), context, context)
    x = queries + attended
    hidden = F.gelu(F.linear(norm(x, "norm2"), weights["mlp.fc1.weight"], weights["mlp.fc1.bias"]))
    expected = x + F.linear(hidden, weights["mlp.fc2.weight"], weights["mlp.fc2.bias"])
    torch.testing.assert_close(ours(queries, context), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_queries__do_not_see_one_another():
    ours = block()
    queries, context = tokens(6, WIDTH, 1), tokens(7, CONTEXT, 2)
    together = ours(queries, context)
    without_third = ours(queries[:, [0, 1, 3, 4, 5]], context)
    torch.testing.assert_close(without_third, together[:, [0, 1, 3, 4, 5]], rtol=0, atol=1e-6)
    changed = queries.clone()
    changed[:, 2] += 10
    others = ours(changed, context)
    torch.testing.assert_close(others[:, [0, 1, 3]], together[:, [0, 1, 3]], rtol=0, atol=1e-6)
    assert (others[:, 2] - together[:, 2]).abs().max() > 1


@torch.no_grad()
def test_the_context__matters_in_every_token_and_not_in_their_order():
    ours = block()
    queries, context = tokens(3, WIDTH, 1), tokens(7, CONTEXT, 2)
    before = ours(queries, context)
    torch.testing.assert_close(ours(queries, context.flip(1)), before, rtol=0, atol=1e-6)
    for place in range(7):
        moved = context.clone()
        moved[:, place] += 3
        assert (ours(queries, moved) - before).abs().max() > 1e-3


def test_it_starts_as_other_blocks_do():
    made = CrossBlock(WIDTH, CONTEXT, HEADS).apply(init_transformer)
    for name, value in made.named_parameters():
        if name.endswith("bias"):
            assert not value.any(), name
        elif value.ndim == 2:
            bound = (6 / sum(value.shape)) ** 0.5  # xavier-uniform
            assert 0.9 * bound < value.abs().max() <= bound, name


def test_heads_that_do_not_divide_the_width__are_a_mistake_of_ours():
    with pytest.raises(AssertionError):
        CrossBlock(WIDTH, CONTEXT, 5)
