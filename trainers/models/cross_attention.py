"""Transformer blocks whose queries attend to a context, and not to one another."""

from __future__ import annotations

import torch
from jaxtyping import Float
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from mimray.trainers.models.vit import LAYER_NORM_EPS


class CrossAttention(nn.Module):
    """Multi-head attention of queries to the tokens of a context.

    Args:
        width: width of the queries, and of the result; a multiple of the heads.
        context_width: width of the context's tokens.
        num_heads: attention heads.

    Source: Vaswani et al. 2017, sec. 3.2.3 "encoder-decoder attention".
    """

    def __init__(self, width: int, context_width: int, num_heads: int) -> None:
        super().__init__()
        assert width % num_heads == 0
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(context_width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, queries: Float[Tensor, "B M D"], context: Float[Tensor, "B V C"]
    ) -> Float[Tensor, "B M D"]:
        """Attend; each query on its own."""
        q = self._heads(self.q(queries))  # B heads M E
        k, v = (self._heads(x) for x in self.kv(context).chunk(2, dim=-1))  # B heads V E
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, 2, (self.num_heads, -1)).transpose(1, 2)


class CrossBlock(nn.Module):
    """A pre-norm transformer block with cross-attention in the place of self-attention.

    The queries are normalised here; the context is taken as it is.

    Args:
        width: width of the queries.
        context_width: width of the context's tokens.
        num_heads: attention heads, which divide `width`.
        mlp_ratio: hidden width of the MLP over `width`.
        norm_eps: epsilon of both norms.

    Source: Fu et al. 2024, "Rethinking Patch Dependence for Masked Autoencoders", sec. 3.2.
    """

    def __init__(
        self,
        width: int,
        context_width: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        norm_eps: float = LAYER_NORM_EPS,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = CrossAttention(width, context_width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(
        self, queries: Float[Tensor, "B M D"], context: Float[Tensor, "B V C"]
    ) -> Float[Tensor, "B M D"]:
        """Transform each query by the context and by itself alone."""
        x = queries + self.attn(self.norm1(queries), context)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out
