"""The vision transformer, on timm's blocks; parameter names are timm's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from jaxtyping import Bool, Float
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from mimray.trainers.config.model import ViTConfig
from mimray.trainers.models.encoder import Encoder
from mimray.trainers.models.noise import replace_drop_path
from mimray.trainers.models.patches import patchify, take_tokens, visible_indices
from mimray.trainers.models.positions import sincos_2d
from mimray.trainers.models.rel_pos import RelPosBias, RelPosBlock
from mimray.trainers.types import Features

LAYER_NORM_EPS = 1e-6


def transformer_blocks(
    width: int,
    depth: int,
    num_heads: int,
    mlp_ratio: float = 4.0,
    drop_path: float = 0.0,
    *,
    layer_scale: float | None = None,
    norm_eps: float = LAYER_NORM_EPS,
    rel_pos_grid: tuple[int, int] | None = None,
) -> nn.ModuleList:
    """Pre-norm transformer blocks with biased qkv.

    BEiT's keys have no bias. Here they have one without effect: it adds the same to every score of
    a query, which the softmax cancels, and its gradient is zero up to rounding.

    Args:
        width: token width.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over width.
        drop_path: rate of the last block; earlier ones rise to it linearly from 0.
        layer_scale: initial scale of each residual branch; None leaves them unscaled.
        norm_eps: epsilon of every LayerNorm.
        rel_pos_grid: (rows, columns) of patches, for relative positions in each block; None for
            none.
    """
    block = Block if rel_pos_grid is None else partial(RelPosBlock, grid=rel_pos_grid)
    blocks = nn.ModuleList(
        block(
            width,
            num_heads,
            mlp_ratio,
            qkv_bias=True,
            init_values=layer_scale,
            norm_layer=partial(nn.LayerNorm, eps=norm_eps),
            drop_path=drop_path * i / max(1, depth - 1),
        )
        for i in range(depth)
    )
    replace_drop_path(list(blocks))
    return blocks


def init_transformer(module: nn.Module) -> None:
    """Initialise Linear and LayerNorm as the official MAE code does: xavier-uniform, zero bias."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def init_cut_normal_(tensor: Tensor) -> None:
    """Fill with a normal of std .02, truncated at one std, as the official BEiT code does."""
    nn.init.trunc_normal_(tensor, std=0.02, a=-0.02, b=0.02)


class PatchProjection(nn.Module):
    """A linear map of flat patches, with the parameters of the equivalent convolution.

    On flat patches, a masked method can project the visible ones only.
    """

    def __init__(self, patch_size: int, in_chans: int, width: int) -> None:
        super().__init__()
        convolution = nn.Conv2d(in_chans, width, patch_size, patch_size)
        assert convolution.bias is not None
        # Initialised as a Linear; the bias keeps the convolution's default (official MAE code).
        nn.init.xavier_uniform_(convolution.weight.view(width, -1))
        self.weight = convolution.weight  # D C p q
        self.bias = convolution.bias  # D

    def forward(self, patches: Float[Tensor, "B N P"]) -> Float[Tensor, "B N D"]:
        """Project patches flattened as (row, column, channel)."""
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # D (p q C)
        return F.linear(patches, weight, self.bias)


class PatchEmbed(nn.Module):
    """The patch projection, under timm's parameter names."""

    def __init__(self, patch_size: int, in_chans: int, width: int) -> None:
        super().__init__()
        self.proj = PatchProjection(patch_size, in_chans, width)

    def forward(self, patches: Float[Tensor, "B N P"]) -> Float[Tensor, "B N D"]:
        """Project patches flattened as (row, column, channel)."""
        projected: Tensor = self.proj(patches)
        return projected


class ViT(Encoder):
    """A plain vision transformer with a class token.

    Parameters are named as in timm's vit. Relative positions that all blocks share are
    `rel_pos_bias.relative_position_bias_table`, as in the official BEiT code; those of one block
    are `blocks.i.rel_pos_bias.relative_position_bias_table`.

    Args:
        config: the encoder's shape, positions and initialisation.
        image_size: (height, width) in pixels, multiples of the patch size.
        in_chans: channels of the input, any number.

    Source: Dosovitskiy et al. 2021; sin-cos positions and initialisation `mae` by He et al.
        2022, A.1; relative positions, layer scale and initialisation `beit` by Bao et al. 2022,
        sec. 2.3 and 2.5.
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
        self.pos_embed = _position_table(config, self.grid)
        self.rel_pos_bias = (
            RelPosBias(self.grid, config.num_heads) if config.rel_pos_bias == "shared" else None
        )
        self.per_block = config.rel_pos_bias == "per_block"
        self.blocks = transformer_blocks(
            config.width,
            config.depth,
            config.num_heads,
            config.mlp_ratio,
            config.drop_path,
            layer_scale=config.layer_scale,
            norm_eps=config.norm_eps,
            rel_pos_grid=self.grid if self.per_block else None,
        )
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        if config.init == "mae":
            self._init_as_mae()
        else:
            self._init_as_beit()

    def _init_as_mae(self) -> None:
        self.blocks.apply(init_transformer)
        for token in self._trained_tokens():
            nn.init.normal_(token, std=0.02)

    def _init_as_beit(self) -> None:
        for token in self._trained_tokens():
            init_cut_normal_(token)
        for module in self.modules():
            if isinstance(module, nn.Linear | PatchProjection):
                init_cut_normal_(module.weight)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            # The ends of both residual branches, so that their sum keeps its scale with depth.
            for i, block in enumerate(self.blocks, start=1):
                block.get_parameter("attn.proj.weight").div_(math.sqrt(2 * i))
                block.get_parameter("mlp.fc2.weight").div_(math.sqrt(2 * i))

    def _trained_tokens(self) -> list[nn.Parameter]:
        tokens = [self.cls_token]
        if self.pos_embed is not None and self.pos_embed.requires_grad:
            tokens.append(self.pos_embed)
        return tokens

    @property
    def embed_width(self) -> int:
        """Width of the patch embedding, and so of a mask token."""
        return self.width

    @property
    def last_decay_layer(self) -> int:
        """One more than there are blocks."""
        return self.depth + 1

    def decay_layer(self, name: str) -> int:
        """0 for tokens, positions and patches, i + 1 for block i, `last_decay_layer` for the rest.

        Source: official BEiT code, `optim_factory.py`, which MAE's follows.
        """
        part, _, rest = name.partition(".")
        if part in ("cls_token", "pos_embed", "patch_embed"):
            return 0
        return int(rest.partition(".")[0]) + 1 if part == "blocks" else self.last_decay_layer

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        mask: Bool[Tensor, "B N"] | None = None,
        mask_token: Float[Tensor, "1 1 D"] | None = None,
        norm: bool = True,
    ) -> Features:
        """Encode pictures; without a mask token, hidden patches are not even projected."""
        grid = self._grid_of((images.shape[2], images.shape[3]))
        x = self._embed(images, grid, mask, mask_token)
        relative = self._relative(grid, x.dtype)
        for block in self.blocks:
            x = self._run(block, x, relative)
        if norm:
            x = self.norm(x)  # B 1+N D
        prefix, tokens = x[:, :1], x[:, 1:]
        return Features(tokens, prefix, pooled=tokens.mean(dim=1), grid=grid)

    def features(
        self, images: Float[Tensor, "B C H W"], layers: Sequence[int], norm: bool = True
    ) -> tuple[Float[Tensor, "B _ _ _"], ...]:
        """Maps after the given blocks; blocks past the last one asked for are not run."""
        wanted = self._wanted(layers)
        grid = self._grid_of((images.shape[2], images.shape[3]))
        x = self._embed(images, grid)
        relative = self._relative(grid, x.dtype)
        maps: dict[int, Tensor] = {}
        for i, block in enumerate(self.blocks[: max(wanted) + 1]):
            x = self._run(block, x, relative)
            if i in wanted:
                maps[i] = self._map(x, grid, norm)
        return tuple(maps[i] for i in wanted)

    def forward_intermediates(
        self, images: Float[Tensor, "B C H W"], layers: Sequence[int], norm: bool = True
    ) -> tuple[Features, tuple[Float[Tensor, "B _ _ _"], ...]]:
        """Features and maps in one pass."""
        wanted = self._wanted(layers) if layers else []
        grid = self._grid_of((images.shape[2], images.shape[3]))
        x = self._embed(images, grid)
        relative = self._relative(grid, x.dtype)
        maps: dict[int, Tensor] = {}
        for i, block in enumerate(self.blocks):
            x = self._run(block, x, relative)
            if i in wanted:
                maps[i] = self._map(x, grid, norm)
        x = self.norm(x)  # B 1+N D
        prefix, tokens = x[:, :1], x[:, 1:]
        features = Features(tokens, prefix, pooled=tokens.mean(dim=1), grid=grid)
        return features, tuple(maps[i] for i in wanted)

    def _map(self, x: Tensor, grid: tuple[int, int], norm: bool) -> Tensor:
        tokens = (self.norm(x) if norm else x)[:, 1:]  # B N D
        return cast(Tensor, tokens.transpose(1, 2).unflatten(2, grid))  # B D h w

    def _embed(
        self,
        images: Tensor,
        grid: tuple[int, int],
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Tensor:
        patches = patchify(self._cast(images), self.stride)  # B N P
        keep = None
        if mask is not None and mask_token is None:
            keep = visible_indices(mask)  # B K
            patches = take_tokens(patches, keep)
        # Residuals are summed in the weights' precision, which autocast lowers at a product.
        x = self.patch_embed(patches).to(patches.dtype)
        if mask is not None and mask_token is not None:
            x = torch.where(mask.unsqueeze(-1), mask_token.to(x.dtype), x)
        first: Tensor = self.cls_token
        if self.pos_embed is not None:
            positions = self._positions(self.pos_embed, grid).to(x.dtype)
            first = first + positions[:, :1]
            places = positions[:, 1:].expand(x.shape[0], -1, -1)  # B N D
            x = x + (places if keep is None else take_tokens(places, keep))
        return torch.cat([first.expand(x.shape[0], -1, -1), x], dim=1)  # B 1+N D

    def _positions(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        if grid == self.grid:
            return table
        resampled = resample_abs_pos_embed(table, list(grid), list(self.grid), num_prefix_tokens=1)
        return cast(Tensor, resampled)

    def _relative(
        self, grid: tuple[int, int], dtype: torch.dtype
    ) -> Tensor | tuple[int, int] | None:
        """The blocks' argument for relative positions.

        It is the bias they share, or the grid from which each makes its own bias, or None.
        """
        if self.rel_pos_bias is not None:
            shared: Tensor = self.rel_pos_bias(grid).to(dtype)
            return shared
        return grid if self.per_block else None


def _position_table(config: ViTConfig, grid: tuple[int, int]) -> nn.Parameter | None:
    """Absolute positions [1, 1 + N, D], class token first; sin-cos ones are not trained."""
    if config.positions == "none":
        return None
    if config.positions == "sincos":
        table = sincos_2d(config.width, grid, num_prefix=1).unsqueeze(0)
        return nn.Parameter(table, requires_grad=False)
    return nn.Parameter(torch.empty(1, 1 + grid[0] * grid[1], config.width))
