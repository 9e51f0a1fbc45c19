"""The vision transformer, on timm's blocks; parameter names are timm's own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from jaxtyping import Bool, Float
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from trainers.config.model import ViTConfig
from trainers.models.encoder import Encoder
from trainers.models.patches import patchify, take_tokens, visible_indices
from trainers.models.positions import sincos_2d
from trainers.types import Features

LAYER_NORM_EPS = 1e-6


def transformer_blocks(
    width: int, depth: int, num_heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0
) -> nn.ModuleList:
    """Pre-norm transformer blocks with biased qkv and LayerNorm eps 1e-6.

    Args:
        width: token width.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over width.
        drop_path: rate of the last block; earlier ones rise to it linearly from 0.
    """
    return nn.ModuleList(
        Block(
            width,
            num_heads,
            mlp_ratio,
            qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=LAYER_NORM_EPS),
            drop_path=drop_path * i / max(1, depth - 1),
        )
        for i in range(depth)
    )


def init_transformer(module: nn.Module) -> None:
    """Initialise Linear and LayerNorm as the official MAE code does: xavier-uniform, zero bias."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


class PatchProjection(nn.Module):
    """A linear map of flat patches, with the parameters of the convolution it equals.

    Knowing only flat patches lets a masked method project the visible ones alone.
    """

    def __init__(self, patch_size: int, in_chans: int, width: int) -> None:
        super().__init__()
        convolution = nn.Conv2d(in_chans, width, patch_size, patch_size)
        assert convolution.bias is not None
        # As the Linear it is used as; the bias keeps the convolution's default (official MAE code).
        nn.init.xavier_uniform_(convolution.weight.view(width, -1))
        self.weight = convolution.weight  # D C p q
        self.bias = convolution.bias  # D

    def forward(self, patches: Float[Tensor, "B N P"]) -> Float[Tensor, "B N D"]:
        """Project patches flattened as (row, column, channel)."""
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # D (p q C)
        return F.linear(patches, weight, self.bias)


class PatchEmbed(nn.Module):
    """Holds the projection under the name timm gives it."""

    def __init__(self, patch_size: int, in_chans: int, width: int) -> None:
        super().__init__()
        self.proj = PatchProjection(patch_size, in_chans, width)

    def forward(self, patches: Float[Tensor, "B N P"]) -> Float[Tensor, "B N D"]:
        """Project patches flattened as (row, column, channel)."""
        projected: Tensor = self.proj(patches)
        return projected


class ViT(Encoder):
    """ViT with a class token and fixed sin-cos positions.

    Args:
        config: shape.
        image_size: (height, width) in pixels, multiples of the patch size.
        in_chans: channels of the input, any number.

    Source: Dosovitskiy et al. 2021; positions and initialisation as He et al. 2022, A.1.
    """

    num_prefix_tokens = 1

    def __init__(self, config: ViTConfig, image_size: tuple[int, int], in_chans: int = 3) -> None:
        super().__init__()
        self.width = config.width
        self.depth = config.depth
        self.stride = config.patch_size
        self.in_chans = in_chans
        self.image_size = image_size
        self.strides = (config.patch_size,) * config.depth
        self.widths = (config.width,) * config.depth

        self.grid = self._grid_of(image_size)
        self.patch_embed = PatchEmbed(config.patch_size, in_chans, config.width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.pos_embed = nn.Parameter(
            sincos_2d(config.width, self.grid, num_prefix=1).unsqueeze(0), requires_grad=False
        )
        self.blocks = transformer_blocks(
            config.width, config.depth, config.num_heads, config.mlp_ratio, config.drop_path
        )
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.blocks.apply(init_transformer)
        nn.init.normal_(self.cls_token, std=0.02)

    @property
    def embed_width(self) -> int:
        """Width of the patch embedding, and so of a mask token."""
        return self.width

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        mask: Bool[Tensor, "B N"] | None = None,
        mask_token: Float[Tensor, "1 1 W"] | None = None,
    ) -> Features:
        """Encode pictures; without a mask token hidden patches are not even projected."""
        size = images.shape[2], images.shape[3]
        x = self._embed(images, mask, mask_token)
        for block in self.blocks:
            x = self._run(block, x)
        x = self.norm(x)  # B 1+N D
        prefix, tokens = x[:, :1], x[:, 1:]
        return Features(tokens, prefix, pooled=tokens.mean(dim=1), grid=self._grid_of(size))

    def features(
        self, images: Float[Tensor, "B C H W"], layers: Sequence[int], norm: bool = True
    ) -> tuple[Float[Tensor, "B _ _ _"], ...]:
        """Maps after the given blocks; blocks past the last one asked for are not run."""
        wanted = self._wanted(layers)
        h, w = self._grid_of((images.shape[2], images.shape[3]))
        x = self._embed(images)
        maps: dict[int, Tensor] = {}
        for i, block in enumerate(self.blocks[: max(wanted) + 1]):
            x = self._run(block, x)
            if i in wanted:
                tokens = (self.norm(x) if norm else x)[:, 1:]  # B N D
                maps[i] = tokens.transpose(1, 2).unflatten(2, (h, w))  # B D h w
        return tuple(maps[i] for i in wanted)

    def _embed(
        self, images: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None
    ) -> Tensor:
        positions = self._positions((images.shape[2], images.shape[3])).to(images.dtype)
        patches = patchify(images, self.stride)  # B N P
        places = positions[:, 1:]  # 1 N D
        if mask is not None and mask_token is None:
            keep = visible_indices(mask)  # B K
            patches = take_tokens(patches, keep)
            places = take_tokens(places.expand(images.shape[0], -1, -1), keep)
        x = self.patch_embed(patches)
        if mask is not None and mask_token is not None:
            x = torch.where(mask.unsqueeze(-1), mask_token.to(x.dtype), x)
        first = (self.cls_token + positions[:, :1]).expand(x.shape[0], -1, -1)
        return torch.cat([first, x + places], dim=1)  # B 1+N D

    def _positions(self, size: tuple[int, int]) -> Tensor:
        grid = self._grid_of(size)
        if grid == self.grid:
            return self.pos_embed
        resampled = resample_abs_pos_embed(
            self.pos_embed, list(grid), list(self.grid), num_prefix_tokens=1
        )
        return cast(Tensor, resampled)
