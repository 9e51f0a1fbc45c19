"""The vision transformer, on timm's blocks; parameter names are timm's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from mimray.trainers.config.model import ViTConfig
from mimray.trainers.models.encoder import Encoder
from mimray.trainers.models.mlp import ProjectionWithoutKeyBias, mlp_options, norm_maker
from mimray.trainers.models.noise import replace_drop_path
from mimray.trainers.models.patches import patchify, take_tokens, visible_indices
from mimray.trainers.models.positions import sincos_2d
from mimray.trainers.models.rel_pos import RelPosBias, RelPosBlock
from mimray.trainers.models.rope import RopeBlock, rope_at, rope_table
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
    block: Callable[..., Block] = Block,
    key_bias: bool = True,
    **options: Any,
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
        norm_eps: epsilon of every norm.
        block: what makes a block.
        key_bias: False to hold the bias of the keys at zero.
        options: further arguments of timm's block.
    """
    options = {"norm_layer": norm_maker("layer", norm_eps), **options}
    blocks = nn.ModuleList(
        block(
            width,
            num_heads,
            mlp_ratio,
            qkv_bias=True,
            init_values=layer_scale,
            drop_path=drop_path * i / max(1, depth - 1),
            **options,
        )
        for i in range(depth)
    )
    if not key_bias:
        for made in blocks:
            made.get_submodule("attn").qkv = ProjectionWithoutKeyBias(width, 3 * width)
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
    """A plain vision transformer: prefix tokens (class token, registers), then the patches.

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
    num_tokens_varies = True

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
        self.num_prefix_tokens = config.num_prefix_tokens
        self.cls_token = _tokens(int(config.class_token), config.width)
        self.reg_token = _tokens(config.num_registers, config.width)
        self.pos_embed = _position_table(config, self.grid)
        self.rel_pos_bias = (
            RelPosBias(self.grid, config.num_heads) if config.rel_pos_bias == "shared" else None
        )
        self.per_block = config.rel_pos_bias == "per_block"
        self.rope = config if config.rope != "none" else None
        block: Callable[..., Block] = Block
        if self.per_block:
            block = partial(RelPosBlock, grid=self.grid)
        elif self.rope is not None:
            block = partial(RopeBlock, interleaved=config.rope == "eva02")
        norm = norm_maker(config.norm, config.norm_eps)
        self.blocks = transformer_blocks(
            config.width,
            config.depth,
            config.num_heads,
            config.mlp_ratio,
            config.drop_path,
            layer_scale=config.layer_scale,
            block=block,
            key_bias=config.key_bias,
            norm_layer=norm,
            qk_norm=config.qk_norm,
            scale_attn_norm=config.attn_norm,
            scale_mlp_norm=config.mlp_norm,
            **mlp_options(config.mlp),
        )
        self.norm = norm(config.width)
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
        tokens = [token for token in (self.cls_token, self.reg_token) if token is not None]
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
        if part in ("cls_token", "reg_token", "pos_embed", "patch_embed"):
            return 0
        return int(rest.partition(".")[0]) + 1 if part == "blocks" else self.last_decay_layer

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        mask: Bool[Tensor, "B N"] | None = None,
        mask_token: Float[Tensor, "1 1 D"] | None = None,
        norm: bool = True,
        layers: Sequence[int] = (),
    ) -> Features:
        """Encode pictures; without a mask token, hidden patches are not even projected.

        Args:
            images: normalised pictures.
            mask: as in every encoder.
            mask_token: as in every encoder.
            norm: True to apply the final norm to the tokens, and to those of each layer.
            layers: blocks whose tokens are returned as well, counted as for `features`.
        """
        wanted = self._wanted(layers) if layers else []
        grid = self._grid_of((images.shape[2], images.shape[3]))
        x, keep = self._embed(images, grid, mask, mask_token)
        places = self._places(grid, x, keep)
        after: dict[int, Tensor] = {}
        for i, block in enumerate(self.blocks):
            x = self._run(block, x, places)
            if i in wanted or i == self.depth - 1:
                after[i] = self.norm(x) if norm else x  # B P+N D
        last = self._features(after[self.depth - 1], grid)
        return last._replace(layers=tuple(after[i] for i in wanted))

    def features(
        self, images: Float[Tensor, "B C H W"], layers: Sequence[int], norm: bool = True
    ) -> tuple[Float[Tensor, "B _ _ _"], ...]:
        """Maps after the given blocks; blocks past the last one asked for are not run."""
        wanted = self._wanted(layers)
        grid = self._grid_of((images.shape[2], images.shape[3]))
        x, keep = self._embed(images, grid)
        places = self._places(grid, x, keep)
        maps: dict[int, Tensor] = {}
        for i, block in enumerate(self.blocks[: max(wanted) + 1]):
            x = self._run(block, x, places)
            if i in wanted:
                maps[i] = self._map(x, grid, norm)
        return tuple(maps[i] for i in wanted)

    def forward_intermediates(
        self, images: Float[Tensor, "B C H W"], layers: Sequence[int], norm: bool = True
    ) -> tuple[Features, tuple[Float[Tensor, "B _ _ _"], ...]]:
        """Features and maps in one pass."""
        wanted = self._wanted(layers) if layers else []
        grid = self._grid_of((images.shape[2], images.shape[3]))
        x, keep = self._embed(images, grid)
        places = self._places(grid, x, keep)
        maps: dict[int, Tensor] = {}
        for i, block in enumerate(self.blocks):
            x = self._run(block, x, places)
            if i in wanted:
                maps[i] = self._map(x, grid, norm)
        x = self.norm(x)  # B P+N D
        return self._features(x, grid), tuple(maps[i] for i in wanted)

    def _features(self, x: Tensor, grid: tuple[int, int]) -> Features:
        prefix, tokens = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        return Features(tokens, prefix, pooled=tokens.mean(dim=1), grid=grid)

    def _map(self, x: Tensor, grid: tuple[int, int], norm: bool) -> Tensor:
        tokens = (self.norm(x) if norm else x)[:, self.num_prefix_tokens :]  # B N D
        return cast(Tensor, tokens.transpose(1, 2).unflatten(2, grid))  # B D h w

    def _embed(
        self,
        images: Tensor,
        grid: tuple[int, int],
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens before the first block, and the places of the patches if some are left out."""
        patches = patchify(self._cast(images), self.stride)  # B N P
        keep = None
        if mask is not None and mask_token is None:
            keep = visible_indices(mask)  # B K
            patches = take_tokens(patches, keep)
        # Residuals are summed in the weights' precision, which autocast lowers at a product.
        x = self.patch_embed(patches).to(patches.dtype)
        if mask is not None and mask_token is not None:
            x = torch.where(mask.unsqueeze(-1), mask_token.to(x.dtype), x)
        first: Tensor | None = self.cls_token
        if self.pos_embed is not None:
            positions = self._positions(self.pos_embed, grid).to(x.dtype)
            if first is not None:
                first = first + positions[:, :1]
                positions = positions[:, 1:]
            places = positions.expand(x.shape[0], -1, -1)  # B N D
            x = x + (places if keep is None else take_tokens(places, keep))
        prefix = [token for token in (first, self.reg_token) if token is not None]
        return torch.cat([*(t.expand(x.shape[0], -1, -1) for t in prefix), x], dim=1), keep

    def _positions(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        if grid == self.grid:
            return table
        resampled = resample_abs_pos_embed(
            table, list(grid), list(self.grid), num_prefix_tokens=int(self.cls_token is not None)
        )
        return cast(Tensor, resampled)

    def _places(
        self, grid: tuple[int, int], x: Tensor, keep: Tensor | None
    ) -> Tensor | tuple[int, int] | None:
        """The blocks' argument for positions.

        It is the relative bias they share, or the grid from which each makes its own bias, or
        RoPE's table, or None.
        """
        if self.rel_pos_bias is not None:
            shared: Tensor = self.rel_pos_bias(grid).to(x.dtype)
            return shared
        if self.rope is not None:
            table = rope_table(self.rope, grid, x.device)
            return table if keep is None else rope_at(table, keep)
        return grid if self.per_block else None


def _tokens(count: int, width: int) -> nn.Parameter | None:
    return nn.Parameter(torch.empty(1, count, width)) if count else None


def _position_table(config: ViTConfig, grid: tuple[int, int]) -> nn.Parameter | None:
    """Absolute positions [1, N, D], the class token's first if there is one.

    Registers have none; sin-cos positions are not trained.
    """
    if config.positions == "none":
        return None
    first = int(config.class_token)
    if config.positions == "sincos":
        table = sincos_2d(config.width, grid, num_prefix=first).unsqueeze(0)
        return nn.Parameter(table, requires_grad=False)
    return nn.Parameter(torch.empty(1, first + grid[0] * grid[1], config.width))
