"""The MLPs and norms of transformer blocks, and projections without a bias of the keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F


class SwiGLU(nn.Module):
    """A gated MLP: a linear map of silu(gate) * value, of which `fc1` makes both, the gate first.

    The arguments are those that timm's `Block` hands to its MLP.

    Args:
        in_features: width of the tokens.
        hidden_features: channels of the gated product, half the rows of `fc1`.
        norm_layer: norm of the gated product (EVA-02's sub-LN), or None.

    Source: Shazeer 2020, "GLU Variants Improve Transformer"; the layout of DINOv2's `w12`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        norm_layer: Callable[[int], nn.Module] | None = None,
        **_: object,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, 2 * hidden_features)
        self.norm = nn.Identity() if norm_layer is None else norm_layer(hidden_features)
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Transform each token."""
        gate, value = self.fc1(x).chunk(2, dim=-1)
        out: Tensor = self.fc2(self.norm(F.silu(gate) * value))
        return out


class ProjectionWithoutKeyBias(nn.Linear):
    """A joint projection to queries, keys and values in which the keys' bias stays zero.

    The parameter has its place for it, as in DINOv3, so that all blocks have one layout.
    """

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T Q"]:
        """Project each token."""
        queries, keys, values = self.bias.chunk(3)
        return F.linear(x, self.weight, torch.cat([queries, torch.zeros_like(keys), values]))


def mlp_options(kind: Literal["gelu", "gelu_tanh", "swiglu"]) -> dict[str, Any]:
    """Arguments by which timm's `Block` makes an MLP."""
    if kind == "swiglu":
        return {"mlp_layer": SwiGLU}
    approximate = "none" if kind == "gelu" else "tanh"
    return {"mlp_layer": Mlp, "act_layer": partial(nn.GELU, approximate=approximate)}


def norm_maker(kind: Literal["layer", "rms"], eps: float) -> Callable[[int], nn.Module]:
    """The constructor of a norm of a given width."""
    return partial(nn.LayerNorm if kind == "layer" else nn.RMSNorm, eps=eps)
