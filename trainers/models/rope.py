"""Rotary position embeddings (RoPE): queries and keys of a patch, turned by its place."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor
from torch.nn import functional as F

from mimray.trainers.config.model import ViTConfig
from mimray.trainers.models.patches import take_tokens


def rope_table(
    config: ViTConfig, grid: tuple[int, int], device: torch.device
) -> Float[Tensor, "N A"]:
    """Sines, then cosines, of the angles by which the patches of a grid are turned.

    A quarter of a head's channels turns by the row, a quarter by the column, each pair of channels
    at a frequency of its own. In `dinov3` places are in -1..1 along each side, whatever the
    grid, and the channels of a pair are half a head apart. In `eva02` they are counted in patches,
    or stretched to `rope_grid`, and the channels of a pair are neighbours.

    Args:
        config: the encoder's architecture.
        grid: (rows, columns) of patches.
        device: device to compute on.

    Returns:
        float32 [N, 2 E], row-major, E the channels of a head.

    Source: Siméoni et al. 2025 (DINOv3), sec. 3.2 and `rope_position_encoding.py`; Fang et al. 2023
        (EVA-02) and `rope.py` of the official code.
    """
    quarter = config.width // config.num_heads // 4
    exponents = torch.arange(quarter, dtype=torch.float32, device=device) / quarter
    places = [torch.arange(side, dtype=torch.float32, device=device) for side in grid]
    if config.rope == "dinov3":
        frequencies = 2 * math.pi / (config.rope_temperature or 100.0) ** exponents
        places = [(p + 0.5) / side * 2 - 1 for p, side in zip(places, grid, strict=True)]
    else:
        frequencies = 1 / (config.rope_temperature or 10000.0) ** exponents
        if config.rope_grid is not None:
            sides = zip(places, grid, config.rope_grid, strict=True)
            places = [p / side * wanted for p, side, wanted in sides]
    rows, columns = torch.meshgrid(*places, indexing="ij")
    angles = torch.stack([rows, columns], dim=-1).flatten(0, 1).unsqueeze(-1) * frequencies  # N 2 Q
    angles = angles.flatten(1)  # N 2Q
    full = angles.tile(2) if config.rope == "dinov3" else angles.repeat_interleave(2, dim=-1)
    return torch.cat([full.sin(), full.cos()], dim=-1)


def rope_at(table: Float[Tensor, "N A"], places: Int[Tensor, "B K"]) -> Float[Tensor, "B 1 K A"]:
    """The rows of a table for the patches that each picture keeps."""
    return take_tokens(table.expand(places.shape[0], -1, -1), places).unsqueeze(1)


class RopeAttention(Attention):  # type: ignore[misc]  # timm has no types
    """timm's attention, with patches turned by their places and prefix tokens left as they are.

    Attributes:
        interleaved: True if the two channels of a pair are neighbours, as in `eva02`.
    """

    interleaved = False

    def forward(self, x: Float[Tensor, "B T D"], rope: Tensor) -> Float[Tensor, "B T D"]:
        """Attend among all tokens.

        Args:
            x: tokens, those of the patches last.
            rope: sines and cosines, float32 [N, 2 E] or [B, 1, N, 2 E].
        """
        b, t, _ = x.shape
        joint = self.qkv(x).reshape(b, t, 3, self.num_heads, self.head_dim)  # B T 3 heads E
        q, k, v = joint.permute(2, 0, 3, 1, 4).unbind(0)  # B heads T E
        q, k = self._turned(self.q_norm(q), rope), self._turned(self.k_norm(k), rope)
        mixed = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        out: Tensor = self.proj(self.norm(mixed.transpose(1, 2).flatten(2)))
        return out

    def _turned(self, x: Tensor, rope: Tensor) -> Tensor:
        sines, cosines = rope.chunk(2, dim=-1)
        prefix, patches = torch.split(x, [x.shape[2] - rope.shape[-2], rope.shape[-2]], dim=2)
        if self.interleaved:
            crossed = torch.stack([-patches[..., 1::2], patches[..., ::2]], dim=-1).flatten(-2)
        else:
            first, second = patches.chunk(2, dim=-1)
            crossed = torch.cat([-second, first], dim=-1)
        turned = patches * cosines + crossed * sines  # in fp32 at least
        return torch.cat([prefix, turned.to(x.dtype)], dim=2)


class RopeBlock(Block):  # type: ignore[misc]  # timm has no types
    """A transformer block whose attention knows places by RoPE."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *args: object,
        interleaved: bool,
        **kwargs: object,
    ) -> None:
        super().__init__(dim, num_heads, *args, attn_layer=RopeAttention, **kwargs)
        self.attn.interleaved = interleaved

    def forward(self, x: Float[Tensor, "B T D"], rope: Tensor) -> Float[Tensor, "B T D"]:
        """Transform tokens, prefix tokens first; `rope` as in the attention."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), rope)))
        out: Tensor = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return out
