"""Predictors of single hidden places, each from the visible tokens alone."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mimray.trainers.models.blocks import BlockRunner
from mimray.trainers.models.cross_attention import CrossBlock
from mimray.trainers.models.patches import take_tokens, visible_indices
from mimray.trainers.models.positions import sincos_2d
from mimray.trainers.models.vit import LAYER_NORM_EPS, init_transformer


class PlacePredictor(BlockRunner):
    """Mask tokens at chosen places, which attend to the encoder's output and not to one another.

    What is predicted of a place does not depend on the other places that are asked for.

    Args:
        encoder_width: width of the encoder's tokens.
        width: token width of the predictor.
        depth: number of blocks.
        num_heads: attention heads.
        grid: (rows, columns) of patches.
        norm_eps: epsilon of every LayerNorm.

    Source: Darcet et al. 2025, sec. 3.4 "predictor"; fixed sin-cos positions, of visible tokens as
        of mask tokens, in place of its rotary ones.
    """

    num_tokens_varies = True

    def __init__(
        self,
        encoder_width: int,
        width: int,
        depth: int,
        num_heads: int,
        grid: tuple[int, int],
        norm_eps: float = LAYER_NORM_EPS,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_2d(width, grid).unsqueeze(0), requires_grad=False)
        self.blocks = nn.ModuleList(
            CrossBlock(width, width, num_heads, norm_eps=norm_eps) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.apply(init_transformer)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        tokens: Float[Tensor, "B K D"],
        prefix: Float[Tensor, "B Q D"],
        mask: Bool[Tensor, "B N"],
        places: Int[Tensor, "B M"],
    ) -> Float[Tensor, "B M W"]:
        """Predict features of places.

        Args:
            tokens: tokens of the visible patches, in row-major order.
            prefix: class token and registers, any number of them.
            mask: mask of the patches, True = hidden.
            places: indices of the places to predict.
        """
        positions = self.pos_embed.expand(len(mask), -1, -1)  # B N W
        context = self.embed(torch.cat([prefix, tokens], dim=1))  # B Q+K W
        # Residuals are summed in the weights' precision, which autocast lowers at a product.
        registers, visible = context.to(self.mask_token.dtype).split(
            [prefix.shape[1], tokens.shape[1]], dim=1
        )
        visible = visible + take_tokens(positions, visible_indices(mask))
        context = torch.cat([registers, visible], dim=1)
        queries = self.mask_token + take_tokens(positions, places)  # B M W
        for block in self.blocks:
            queries = self._run(block, queries, context)
        predicted: Tensor = self.norm(queries)
        return predicted
