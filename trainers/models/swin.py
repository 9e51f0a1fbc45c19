"""The Swin transformer, on timm's blocks; parameter names are timm's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from timm.layers import PatchEmbed
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torch import Tensor, nn

from mimray.trainers.config.model import SwinConfig
from mimray.trainers.models.encoder import Encoder
from mimray.trainers.models.noise import replace_drop_path
from mimray.trainers.types import Features


class SwinBlock(SwinTransformerBlock):  # type: ignore[misc]  # timm has no types
    """timm's block, with attention masks for other sizes than the one it was built for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # This makes timm call `get_attn_mask` at each forward pass.
        self.dynamic_mask = True

    def get_attn_mask(
        self,
        x: Tensor | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor | None:
        """The mask between regions that a shift has brought into one window; None without a shift.

        Args:
            x: shifted tokens [B, h, w, D]; None for the size the block was built for.
            device: the device of the mask if `x` is None.
            dtype: the data type of the mask if `x` is None.

        Returns:
            float [windows, window area, window area], 0 or -100.
        """
        mask: Tensor | None
        if x is not None and tuple(x.shape[1:3]) == self.input_resolution:
            # DeepSpeed casts parameters to bf16 and leaves buffers alone.
            mask = None if self.attn_mask is None else self.attn_mask.to(x.dtype)
        else:
            mask = super().get_attn_mask(x, device, dtype)
        return mask


class Swin(Encoder):
    """Swin transformer; a layer is a stage, and only the last stage's map is normalised.

    Args:
        config: the encoder's shape.
        image_size: (height, width) in pixels, multiples of the stride.
        in_chans: channels of the input, any number.

    Source: Liu et al. 2021; mask token after the patch embedding by Xie et al. 2022, sec. 3.
    """

    num_prefix_tokens = 0

    def __init__(self, config: SwinConfig, image_size: tuple[int, int], in_chans: int = 3) -> None:
        super().__init__()
        stages = range(len(config.depths))
        self.depth = len(stages)
        self.widths = tuple(config.width * 2**i for i in stages)
        self.strides = tuple(config.patch_size * 2**i for i in stages)
        self.width = self.widths[-1]
        self.stride = self.strides[-1]
        self.in_chans = in_chans
        self.image_size = image_size

        self.grid = self._grid_of(image_size)
        self.patch_embed = PatchEmbed(
            image_size,
            config.patch_size,
            in_chans,
            config.width,
            norm_layer=nn.LayerNorm,
            output_fmt="NHWC",
            strict_img_size=False,
        )
        self.layers = nn.ModuleList(self._build_stage(config, stage) for stage in stages)
        self.norm = nn.LayerNorm(self.width)
        self.apply(_init_linear)
        replace_drop_path([block for stage in self._stages for block in stage["blocks"]])

    def _build_stage(self, config: SwinConfig, stage: int) -> nn.ModuleDict:
        """Blocks of one width; every stage but the first begins with a merge of 2x2 tokens."""
        width = self.widths[stage]
        scale = 2 ** (self.depth - 1 - stage)
        grid = self.grid[0] * scale, self.grid[1] * scale
        before, num_blocks = sum(config.depths[:stage]), sum(config.depths)
        blocks = nn.ModuleList(
            SwinBlock(
                width,
                input_resolution=grid,
                num_heads=config.num_heads[stage],
                window_size=config.window_size,
                # timm does not shift along a side that is no longer than a window.
                shift_size=config.window_size // 2 if i % 2 else 0,
                mlp_ratio=config.mlp_ratio,
                drop_path=config.drop_path * (before + i) / max(1, num_blocks - 1),
            )
            for i in range(config.depths[stage])
        )
        merge = PatchMerging(width // 2, width) if stage else nn.Identity()
        return nn.ModuleDict({"downsample": merge, "blocks": blocks})

    @property
    def embed_width(self) -> int:
        """Width of the patch embedding, and so of a mask token."""
        return self.widths[0]

    @property
    def last_decay_layer(self) -> int:
        """One more than there are blocks, over all stages."""
        return sum(len(stage["blocks"]) for stage in self._stages) + 1

    def decay_layer(self, name: str) -> int:
        """0 for patches, from 1 for blocks of all stages; a merge goes with the block before it.

        Source: official SimMIM code, `get_swin_layer` of `optimizer.py`, where a merge ends a
            stage and does not begin one.
        """
        part, *rest = name.split(".")
        if part == "patch_embed":
            return 0
        if part != "layers":
            return self.last_decay_layer
        stage, kind, *inner = rest
        before = sum(len(earlier["blocks"]) for earlier in self._stages[: int(stage)])
        return before + int(inner[0]) + 1 if kind == "blocks" else before

    @property
    def _stages(self) -> list[Any]:
        return list(self.layers)

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        mask: Bool[Tensor, "B N"] | None = None,
        mask_token: Float[Tensor, "1 1 D"] | None = None,
        norm: bool = True,
    ) -> Features:
        """Encode pictures; a hidden output token hides all of its patches."""
        grid = self._grid_of((images.shape[2], images.shape[3]))
        x = self._embed(images)
        if mask is not None:
            assert mask_token is not None, "windows need every token"
            patches = 2 ** (self.depth - 1)  # along the side of an output token
            hidden = torch.unflatten(mask, 1, grid)  # B h w, of the output
            hidden = hidden.repeat_interleave(patches, 1).repeat_interleave(patches, 2)
            x = torch.where(hidden.unsqueeze(-1), mask_token.to(x.dtype), x)
        for stage in self.layers:
            x = self._run_stage(stage, x)
        tokens = (self.norm(x) if norm else x).flatten(1, 2)  # B N D
        return Features(tokens, tokens[:, :0], pooled=tokens.mean(dim=1), grid=grid)

    def features(
        self, images: Float[Tensor, "B C H W"], layers: Sequence[int], norm: bool = True
    ) -> tuple[Float[Tensor, "B _ _ _"], ...]:
        """Maps after the given stages; stages past the last one asked for are not run."""
        wanted = self._wanted(layers)
        self._grid_of((images.shape[2], images.shape[3]))
        x = self._embed(images)
        maps: dict[int, Tensor] = {}
        for i, stage in enumerate(self.layers[: max(wanted) + 1]):
            x = self._run_stage(stage, x)
            last = i == self.depth - 1
            maps[i] = (self.norm(x) if norm and last else x).permute(0, 3, 1, 2)  # B D h w
        return tuple(maps[i] for i in wanted)

    def forward_intermediates(
        self, images: Float[Tensor, "B C H W"], layers: Sequence[int], norm: bool = True
    ) -> tuple[Features, tuple[Float[Tensor, "B _ _ _"], ...]]:
        """Features and maps in one pass."""
        wanted = self._wanted(layers) if layers else []
        maps = self.features(images, tuple(range(self.depth)), norm)
        last = maps[-1].permute(0, 2, 3, 1)  # B h w D
        tokens = (last if norm else self.norm(last)).flatten(1, 2)  # B N D
        grid = (last.shape[1], last.shape[2])
        features = Features(tokens, tokens[:, :0], pooled=tokens.mean(dim=1), grid=grid)
        return features, tuple(maps[i] for i in wanted)

    def _embed(self, images: Tensor) -> Tensor:
        """Patches [B, h, w, D] of the first stage, in the weights' precision, as residuals are."""
        cast = self._cast(images)
        embedded: Tensor = self.patch_embed(cast).to(cast.dtype)
        return embedded

    def _run_stage(self, stage: Any, x: Tensor) -> Tensor:
        x = stage["downsample"](x).to(x.dtype)
        for block in stage["blocks"]:
            x = self._run(block, x)
        return x


def _init_linear(module: nn.Module) -> None:
    """Initialise as the official Swin code: Linear weights normal of std .02, zero bias."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
