"""Encoders a recipe may name: one class for each architecture family, selected by `name`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mimray.trainers.config.base import Config


class _Shape(NamedTuple):
    width: int
    depth: int
    num_heads: int
    patch_size: int


# Dosovitskiy et al. 2021, Table 1; Tiny from Touvron et al. 2021 (DeiT), Table 1.
VIT_SHAPES: dict[str, _Shape] = {
    "vit_tiny": _Shape(192, 12, 3, 16),
    "vit_small": _Shape(384, 12, 6, 16),
    "vit_base": _Shape(768, 12, 12, 16),
    "vit_large": _Shape(1024, 24, 16, 16),
    "vit_huge": _Shape(1280, 32, 16, 14),
}


class ViTConfig(Config):
    """A plain vision transformer, with a class token and registers or without.

    `name` selects a published shape, of which any part may be overridden; `vit` leaves width, depth
    and num_heads to the recipe.
    """

    name: Literal["vit", "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"]
    width: PositiveInt = Field(description="token width D")
    depth: PositiveInt = Field(description="number of transformer blocks")
    num_heads: PositiveInt = Field(description="attention heads; must divide width")
    patch_size: PositiveInt = Field(description="side of a square patch, pixels")
    mlp_ratio: float = Field(default=4.0, gt=0, description="hidden width of the MLP over width")
    drop_path: float = Field(default=0.0, ge=0, lt=1, description="stochastic depth, last block")
    positions: Literal["sincos", "learned", "none"] = Field(
        default="sincos", description="absolute positions added to the patches"
    )
    rel_pos_bias: Literal["none", "shared", "per_block"] = Field(
        default="none", description="relative position bias in attention; shared as in BEiT"
    )
    layer_scale: PositiveFloat | None = Field(
        default=None, description="initial scale of each residual branch; off by default"
    )
    init: Literal["mae", "beit"] = Field(
        default="mae",
        description="mae: xavier-uniform; beit: normal .02 cut at one std, rescaled by depth",
    )
    norm_eps: PositiveFloat = Field(default=1e-6, description="epsilon of every norm")
    class_token: bool = Field(default=True, description="a token for the whole picture, put first")
    num_registers: NonNegativeInt = Field(
        default=0, description="further tokens without a place, after the class token (DINOv2)"
    )
    rope: Literal["none", "dinov3", "eva02"] = Field(
        default="none", description="rotary positions in attention: places in -1..1, or in patches"
    )
    rope_temperature: PositiveFloat | None = Field(
        default=None, description="base of RoPE's frequencies; null is 100 (dinov3), 10000 (eva02)"
    )
    rope_grid: tuple[PositiveInt, PositiveInt] | None = Field(
        default=None, description="rows and columns that eva02's places are stretched to, or null"
    )
    mlp: Literal["gelu", "gelu_tanh", "swiglu"] = Field(
        default="gelu", description="the activation of the MLP; swiglu is a gated one"
    )
    norm: Literal["layer", "rms"] = Field(default="layer", description="LayerNorm or RMSNorm")
    qk_norm: bool = Field(default=False, description="norms of each head's queries and keys")
    attn_norm: bool = Field(default=False, description="a norm before attention's last projection")
    mlp_norm: bool = Field(default=False, description="a norm before the MLP's last projection")
    key_bias: bool = Field(default=True, description="false holds the bias of the keys at zero")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_name(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("name") in VIT_SHAPES:
            return {**VIT_SHAPES[data["name"]]._asdict(), **data}
        if isinstance(data, dict) and data.get("name") == "vit":
            return {"patch_size": 16, **data}
        return data

    @model_validator(mode="after")
    def _check_shape(self) -> ViTConfig:
        if self.width % self.num_heads:
            raise ValueError(
                f"encoder.width {self.width} is not a multiple of num_heads {self.num_heads}"
            )
        if self.width % 4 and self.positions == "sincos":
            raise ValueError(
                f"encoder.width {self.width} is not a multiple of 4, "
                "which 2-D sin-cos positions need"
            )
        if self.rope != "none" and self.width // self.num_heads % 4:
            raise ValueError(
                f"encoder.rope {self.rope} needs heads whose width is a multiple of 4, not "
                f"{self.width // self.num_heads}: encoder.width {self.width} over "
                f"num_heads {self.num_heads}"
            )
        if self.rope_grid is not None and self.rope != "eva02":
            raise ValueError(f"encoder.rope_grid goes with rope eva02, not with {self.rope}")
        if self.rope_temperature is not None and self.rope == "none":
            raise ValueError("encoder.rope_temperature goes with rope dinov3 or eva02")
        if self.rel_pos_bias != "none" and (
            not self.class_token or self.num_registers or self.rope != "none"
        ):
            raise ValueError(
                f"encoder.rel_pos_bias {self.rel_pos_bias} needs the class token alone before the "
                "patches: class_token true, num_registers 0, rope none"
            )
        return self

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before those of the patches: the class token and the registers."""
        return int(self.class_token) + self.num_registers

    @property
    def stride(self) -> int:
        """Pixels between neighbouring output tokens."""
        return self.patch_size

    @property
    def num_layers(self) -> int:
        """Number of layers that have feature maps."""
        return self.depth

    @property
    def out_width(self) -> int:
        """Width of the output tokens."""
        return self.width


class _SwinShape(NamedTuple):
    width: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]


# Liu et al. 2021, sec. 3.3.
SWIN_SHAPES: dict[str, _SwinShape] = {
    "swin_tiny": _SwinShape(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_small": _SwinShape(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin_base": _SwinShape(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "swin_large": _SwinShape(192, (2, 2, 18, 2), (6, 12, 24, 48)),
}


class SwinConfig(Config):
    """A Swin transformer: attention in shifted windows, in stages, each of half the grid.

    `name` selects a published shape, of which any part may be overridden; `swin` leaves width,
    depths and num_heads to the recipe.
    """

    name: Literal["swin", "swin_tiny", "swin_small", "swin_base", "swin_large"]
    width: PositiveInt = Field(description="token width of the first stage; doubles at each next")
    depths: tuple[PositiveInt, ...] = Field(description="transformer blocks of each stage")
    num_heads: tuple[PositiveInt, ...] = Field(description="attention heads of each stage")
    patch_size: PositiveInt = Field(default=4, description="side of a square patch, pixels")
    window_size: PositiveInt = Field(default=7, description="side of a window, tokens")
    mlp_ratio: float = Field(default=4.0, gt=0, description="hidden width of the MLP over width")
    drop_path: float = Field(default=0.0, ge=0, lt=1, description="stochastic depth, last block")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_name(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("name") in SWIN_SHAPES:
            return {**SWIN_SHAPES[data["name"]]._asdict(), **data}
        return data

    @model_validator(mode="after")
    def _check_shape(self) -> SwinConfig:
        if len(self.depths) != len(self.num_heads) or not self.depths:
            raise ValueError(
                f"encoder.depths {self.depths} and num_heads {self.num_heads} must name "
                "the same stages"
            )
        for stage, heads in enumerate(self.num_heads):
            if self.width * 2**stage % heads:
                raise ValueError(
                    f"width {self.width * 2**stage} of stage {stage} is not a multiple of its "
                    f"num_heads {heads}"
                )
        return self

    @property
    def stride(self) -> int:
        """Pixels between neighbouring output tokens."""
        return int(self.patch_size * 2 ** (len(self.depths) - 1))

    @property
    def num_layers(self) -> int:
        """Number of layers that have feature maps: the stages."""
        return len(self.depths)

    @property
    def out_width(self) -> int:
        """Width of the output tokens."""
        return int(self.width * 2 ** (len(self.depths) - 1))


class ConvConfig(Config):
    """A residual convolutional encoder; every stage halves the picture."""

    name: Literal["conv"]
    widths: tuple[PositiveInt, ...] = Field(description="channels of each stage")
    depth: PositiveInt = Field(default=2, description="residual blocks a stage")

    @model_validator(mode="after")
    def _check_shape(self) -> ConvConfig:
        if not self.widths:
            raise ValueError("encoder.widths names no stage")
        return self

    @property
    def stride(self) -> int:
        """Pixels between neighbouring output tokens."""
        return int(2 ** len(self.widths))

    @property
    def num_layers(self) -> int:
        """Number of layers that have feature maps: the stages."""
        return len(self.widths)

    @property
    def out_width(self) -> int:
        """Width of the output tokens."""
        return self.widths[-1]


class DalleConfig(Config):
    """The encoder of DALL-E's tokenizer, for imported weights."""

    name: Literal["dalle"]
    width: PositiveInt = Field(default=256, description="channels of the first group; doubles")
    depth: PositiveInt = Field(default=2, description="residual blocks a group")
    num_groups: PositiveInt = Field(default=4, description="groups; halved in between")

    @property
    def stride(self) -> int:
        """Pixels between neighbouring output tokens."""
        return int(2 ** (self.num_groups - 1))

    @property
    def num_layers(self) -> int:
        """Number of layers that have feature maps: the groups."""
        return self.num_groups

    @property
    def out_width(self) -> int:
        """Width of the output tokens."""
        return int(self.width * 2 ** (self.num_groups - 1))


EncoderConfig = Annotated[
    ViTConfig | SwinConfig | ConvConfig | DalleConfig, Field(discriminator="name")
]
