"""The transformer decoder of masked autoencoders."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mimray.trainers.models.patches import visible_indices
from mimray.trainers.models.positions import sincos_2d
from mimray.trainers.models.vit import LAYER_NORM_EPS, init_transformer, transformer_blocks


class MAEDecoder(nn.Module):
    """A light transformer over visible tokens and mask tokens.

    Args:
        encoder_width: width of the encoder's tokens.
        width: token width of the decoder.
        depth: number of blocks.
        num_heads: attention heads.
        grid: (rows, columns) of patches.
        out_dim: values predicted for each patch.
        norm_eps: epsilon of every LayerNorm.
        num_prefix: the encoder's tokens before the patches, class token and registers, which all go
            through the decoder.

    Source: He et al. 2022, sec. 3 "MAE decoder".
    """

    def __init__(
        self,
        encoder_width: int,
        width: int,
        depth: int,
        num_heads: int,
        grid: tuple[int, int],
        out_dim: int,
        norm_eps: float = LAYER_NORM_EPS,
        num_prefix: int = 1,
    ) -> None:
        super().__init__()
        self.num_prefix = num_prefix
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(
            sincos_2d(width, grid, num_prefix=num_prefix).unsqueeze(0), requires_grad=False
        )
        self.blocks = transformer_blocks(width, depth, num_heads, norm_eps=norm_eps)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.pred = nn.Linear(width, out_dim)
        self.apply(init_transformer)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        tokens: Float[Tensor, "B K D"],
        prefix: Float[Tensor, "B Q D"],
        mask: Bool[Tensor, "B N"],
    ) -> Float[Tensor, "B N P"]:
        """Predict every patch.

        Args:
            tokens: tokens of the visible patches, in row-major order.
            prefix: class token and registers, as many as the decoder was made for.
            mask: mask of the patches, True = hidden.

        Returns:
            Predictions, float [B, N, P], in row-major order.
        """
        x = self.embed(torch.cat([prefix, tokens], dim=1))  # B Q+K W
        x = x.to(self.mask_token.dtype)  # residuals are summed in the weights' precision
        n = mask.shape[1]
        full = self.mask_token.expand(x.shape[0], n, -1)
        places = visible_indices(mask).unsqueeze(-1).expand(-1, -1, x.shape[-1])  # B K W
        full = full.scatter(1, places, x[:, self.num_prefix :])
        x = torch.cat([x[:, : self.num_prefix], full], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        prediction: Tensor = self.pred(self.norm(x))[:, self.num_prefix :]
        return prediction
