"""The transformer decoders of masked autoencoders."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mimray.trainers.config.mae import MAEConfig
from mimray.trainers.config.model import ViTConfig
from mimray.trainers.config.run import Recipe
from mimray.trainers.models.blocks import BlockRunner
from mimray.trainers.models.cross_attention import CrossBlock
from mimray.trainers.models.patches import take_tokens, visible_indices
from mimray.trainers.models.positions import sincos_2d
from mimray.trainers.models.vit import LAYER_NORM_EPS, init_transformer, transformer_blocks


class MAEDecoder(BlockRunner):
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

    num_tokens_varies = True

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
            x = self._run(block, x)
        prediction: Tensor = self.pred(self.norm(x))[:, self.num_prefix :]
        return prediction


class WeightedLayers(nn.Module):
    """Combinations of an encoder's layers, one for each block of a decoder.

    Args:
        num_layers: number of layers combined.
        num_blocks: number of blocks.
        width: token width of the encoder.
        norm_eps: epsilon of the norm behind each combination.

    Source: Fu et al. 2024, sec. 3.3; weights begin as those of a mean.
    """

    def __init__(self, num_layers: int, num_blocks: int, width: int, norm_eps: float) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.full((num_blocks, num_layers), 1 / num_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=norm_eps) for _ in range(num_blocks))

    def forward(self, layers: Sequence[Float[Tensor, "B V D"]]) -> list[Float[Tensor, "B V D"]]:
        """Combine the layers' tokens, place by place.

        Args:
            layers: tokens after each layer.

        Returns:
            The context of each block.
        """
        stacked = torch.stack(list(layers))  # L B V D
        mixed = self.weights @ stacked.flatten(1)  # K (B V D), one product for all blocks
        contexts = torch.unflatten(mixed, 1, stacked.shape[1:]).unbind(0)  # B V D each
        return [norm(context) for norm, context in zip(self.norms, contexts, strict=True)]


class CrossDecoder(BlockRunner):
    """A decoder of cross-attention: hidden patches attend to visible ones, not to each other.

    So each prediction is the same whatever else is decoded.

    Args:
        encoder_width: width of the encoder's tokens.
        width: token width of the decoder.
        depth: number of blocks.
        num_heads: attention heads.
        grid: (rows, columns) of patches.
        out_dim: values predicted for each patch.
        norm_eps: epsilon of every LayerNorm.
        num_layers: layers of the encoder that each block weighs; with one it takes their tokens as
            they are.

    Source: Fu et al. 2024 (CrossMAE), sec. 3.
    """

    num_prefix = 0  # no token but the patches is decoded
    num_tokens_varies = True

    def __init__(
        self,
        encoder_width: int,
        width: int,
        depth: int,
        num_heads: int,
        grid: tuple[int, int],
        out_dim: int,
        norm_eps: float = LAYER_NORM_EPS,
        num_layers: int = 1,
    ) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_2d(width, grid).unsqueeze(0), requires_grad=False)
        self.weighted = (
            WeightedLayers(num_layers, depth, encoder_width, norm_eps) if num_layers > 1 else None
        )
        self.blocks = nn.ModuleList(
            CrossBlock(width, encoder_width, num_heads, norm_eps=norm_eps) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.pred = nn.Linear(width, out_dim)
        self.apply(init_transformer)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self, layers: Sequence[Float[Tensor, "B V D"]], places: Int[Tensor, "B M"]
    ) -> Float[Tensor, "B M P"]:
        """Predict the patches at some places.

        Args:
            layers: the encoder's tokens after each of the layers that the decoder was made for,
                prefix and visible patches alike, with the encoder's final norm.
            places: indices of the patches to predict, row-major over the grid.

        Returns:
            Predictions, in the order of the places.
        """
        positions = take_tokens(self.pos_embed.expand(len(places), -1, -1), places)
        x = self.mask_token + positions  # B M W
        contexts = [*layers] * len(self.blocks) if self.weighted is None else self.weighted(layers)
        for block, context in zip(self.blocks, contexts, strict=True):
            x = self._run(block, x, context)
        prediction: Tensor = self.pred(self.norm(x))
        return prediction


def mae_decoder(recipe: Recipe) -> MAEDecoder | CrossDecoder:
    """Build the decoder that a recipe of method `mae` describes."""
    config, encoder = recipe.method, recipe.encoder
    assert isinstance(config, MAEConfig)
    assert isinstance(encoder, ViTConfig)
    width, depth, num_heads = config.decoder_width, config.decoder_depth, config.decoder_num_heads
    shape = (encoder.width, width, depth, num_heads, recipe.grid)
    out_dim = encoder.stride**2 * recipe.data.channels
    if config.decoder == "self":
        return MAEDecoder(*shape, out_dim, encoder.norm_eps, encoder.num_prefix_tokens)
    num_layers = len(config.chosen_layers(encoder.depth))
    return CrossDecoder(*shape, out_dim, encoder.norm_eps, num_layers)
