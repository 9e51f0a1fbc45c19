"""The predictor of single places: what it depends on, and what it does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mimray.trainers.models.positions import sincos_2d
from mimray.trainers.models.predictor import PlacePredictor

GRID, WIDTH = (3, 5), 16


def predictor(depth: int = 2) -> PlacePredictor:
    torch.manual_seed(0)
    made = PlacePredictor(12, WIDTH, depth, 4, GRID).double()
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def inputs(num_prefix: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of four visible patches of two pictures, a prefix, and the mask."""
    mask = torch.ones(2, 15, dtype=torch.bool)
    mask[0, [1, 4, 5, 14]] = False
    mask[1, [0, 7, 8, 9]] = False
    tokens = torch.randn(2, 4, 12, dtype=torch.float64)
    return tokens, torch.randn(2, num_prefix, 12, dtype=torch.float64), mask


@pytest.mark.parametrize("num_prefix", [0, 2])
def test_predictor__is_cross_attention_to_tokens_at_their_places(num_prefix: int):
    made = predictor(depth=1)
    tokens, prefix, mask = inputs(num_prefix)
    places = torch.tensor([[0, 6], [14, 3]])

    found = made(tokens, prefix, mask, places)

    weights = dict(made.named_parameters())
    table = sincos_2d(WIDTH, GRID).double()

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    for b in range(2):
        visible = linear(tokens[b], "embed") + table[~mask[b]]
        context = torch.cat([linear(prefix[b], "embed"), visible])
        keys, values = linear(context, "blocks.0.attn.kv").chunk(2, dim=-1)
        for m, place in enumerate(places[b]):
            x = weights["mask_token"][0, 0] + table[place]
            query = linear(norm(x, "blocks.0.norm1"), "blocks.0.attn.q")
            mixed = []
            for head in range(4):
                at = slice(4 * head, 4 * head + 4)
                shares = torch.softmax(keys[:, at] @ query[at] / 2, dim=0)  # sqrt(4)
                mixed.append(shares @ values[:, at])
            x = x + linear(torch.cat(mixed), "blocks.0.attn.proj")
            hidden = F.gelu(linear(norm(x, "blocks.0.norm2"), "blocks.0.mlp.fc1"))
            x = x + linear(hidden, "blocks.0.mlp.fc2")
            torch.testing.assert_close(found[b, m], norm(x, "norm"))


def test_predictor__a_place_is_predicted_alike_whatever_else_is():
    made = predictor()
    tokens, prefix, mask = inputs()
    places = torch.tensor([[0, 2, 3, 6], [1, 2, 3, 14]])

    together = made(tokens, prefix, mask, places)

    for m in range(4):
        alone = made(tokens, prefix, mask, places[:, m : m + 1])
        torch.testing.assert_close(alone[:, 0], together[:, m])
    assert (together[:, 0] - together[:, 1]).abs().max() > 1e-3
