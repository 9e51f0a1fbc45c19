"""Architecture and method read off weights: widths, depths, grids, and what cannot be ours."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mimray.trainers.config.beit import BEiTConfig
from mimray.trainers.config.data import DataConfig
from mimray.trainers.config.maskfeat import MaskFeatConfig
from mimray.trainers.config.method import BlockMasking
from mimray.trainers.config.model import SWIN_SHAPES, VIT_SHAPES, EncoderConfig, ViTConfig
from mimray.trainers.errors import BundleError
from mimray.trainers.models.positions import sincos_2d

_CONV = "patch_embed.proj.weight"
_TABLE = "relative_position_bias_table"
_SWIN_EPS = 1e-5
# Heads by width of published vits beside the named ones: SigLIP's SO400M, DINOv2's g.
_OTHER_HEADS = {1152: 16, 1536: 24}

# Parts that our encoders do not have, so that the rest would not compute what it was trained to.
_FOREIGN = {
    r"(^|\.)dist_token$|(^|\.)distillation_token$": "a distillation token",
    r"^norm_pre\.": "a norm before the first block",
    r"^patch_embed\.(backbone|conv|blocks|stem|norm_)": "a convolutional stem",
    r"absolute_pos_embed$|^embeddings\.position_embeddings$": "absolute positions in a swin",
    r"\.(cpb_mlp|logit_scale|continuous_position_bias_mlp)\b": "the attention of Swin V2",
    r"\.rel_pos_(h|w|t)$": "relative positions of another kind (MViT)",
    r"^pos_embed_(spatial|temporal|class)$": "positions in space and time (video)",
    r"\.attn\.gate\.": "gates inside attention",
}


def encoder_section(
    state: dict[str, Tensor], known: Mapping[str, Any], size: tuple[int, int] | None
) -> tuple[dict[str, Any], tuple[int, int]]:
    """The recipe's section `encoder`, and the size of the input.

    Args:
        state: the encoder's; gains a row of positions where the class token has none.
        known: values that a source or a person gives; they go before what the weights show.
        size: (height, width) of the input, or None where it is not known.

    Returns:
        The section, and (height, width) in pixels.

    Raises:
        BundleError: the weights are of no vit or swin, of one that ours are not, or do not show
            enough.
    """
    for pattern, what in _FOREIGN.items():
        if any(re.search(pattern, key) for key in state):
            raise BundleError(f"the model has {what}, which our encoders do not have")
    conv = state[_CONV]
    if conv.ndim != 4 or conv.shape[2] != conv.shape[3]:
        raise BundleError(f"its patches are {tuple(conv.shape[2:])}; our encoders have squares")
    if any(k.startswith("layers.0.blocks.") for k in state):
        return _swin(state, known), size or _swin_size(state)
    size, patch_size = size or _vit_size(state), conv.shape[2]
    return _vit(state, known, (size[0] // patch_size, size[1] // patch_size)), size


def method_section(
    method: Mapping[str, Tensor], known: Mapping[str, Any], encoder: EncoderConfig, data: DataConfig
) -> dict[str, Any]:
    """The recipe's section `method`.

    Args:
        method: weights of the method beside the encoder's.
        known: values that a source or a person gives, the name at least; they go before what the
            weights show.
        encoder: architecture.
        data: size and channels of the input.

    Raises:
        BundleError: it cannot be told from the weights.
    """
    head, stride = method.get("head.weight"), encoder.stride
    grid = data.image_size[0] // stride, data.image_size[1] // stride
    shown: dict[str, Any] = {}
    if known["name"] == "mae":
        if "decoder.embed.weight" in method:
            shown["decoder_width"] = method["decoder.embed.weight"].shape[0]
        shown["decoder_depth"] = _count(method, "decoder.blocks")
        if "decoder_num_heads" not in known:
            raise BundleError(
                "weights do not show the attention heads of their decoder",
                hint="--set method.decoder_num_heads=…",
            )
    elif known["name"] == "simmim":
        fits = 32 % stride == 0 and not any(side % 32 for side in data.image_size)
        shown["mask_unit_px"] = 32 if fits and max(data.image_size) > 32 else None
    elif known["name"] == "beit":
        shown["tokenizer_image_size"] = [8 * side for side in grid]
        shown["min_block_patches"] = _least_block(BEiTConfig, known, grid)
        if head is not None:
            shown["vocab_size"] = head.shape[0]
    elif known["name"] == "maskfeat":
        shown["min_block_patches"] = _least_block(MaskFeatConfig, known, grid)
        if head is not None:
            cells = math.isqrt(head.shape[0] // (9 * data.channels))
            shown["hog_cell_px"] = stride // max(1, cells)
    return shown | dict(known)


def _least_block(
    method: type[BlockMasking], known: Mapping[str, Any], grid: tuple[int, int]
) -> int:
    """The published least block of a mask, or all that may be hidden of a small picture."""
    published = method.model_fields
    ratio = known.get("mask_ratio", published["mask_ratio"].default)
    least: int = published["min_block_patches"].default
    return max(1, min(least, int(grid[0] * grid[1] * ratio)))


def _vit(
    state: dict[str, Tensor], known: Mapping[str, Any], grid: tuple[int, int]
) -> dict[str, Any]:
    width, _, patch_size = state[_CONV].shape[:3]
    depth, num_heads = _count(state, "blocks"), known.get("num_heads") or _vit_heads(state, width)
    shared, own = f"rel_pos_bias.{_TABLE}" in state, f"blocks.0.rel_pos_bias.{_TABLE}" in state
    named = [n for n, shape in VIT_SHAPES.items() if shape[:3] == (width, depth, num_heads)]
    if "rope" not in known and _may_hide_rope(state):
        raise BundleError(
            "the weights may be of an encoder with rotary positions, DINOv3 or EVA-02, which they "
            "do not show",
            hint="--as NAME for weights of timm; else --set encoder.rope=dinov3, eva02 or none",
        )
    gated, first = _gated(state), state.get("blocks.0.mlp.fc1.weight")
    shown: dict[str, Any] = {
        "name": named[0] if named else "vit",
        "width": width,
        "depth": depth,
        "num_heads": num_heads,
        "patch_size": patch_size,
        "mlp_ratio": _mlp_ratio(first.chunk(2)[0] if gated and first is not None else first, width),
        "positions": _positions(state, grid),
        "rel_pos_bias": "shared" if shared else "per_block" if own else "none",
        "class_token": "cls_token" in state,
        "num_registers": state["reg_token"].shape[1] if "reg_token" in state else 0,
        "mlp": "swiglu" if gated else "gelu",
        "norm": "layer" if any(k.endswith(".norm1.bias") for k in state) else "rms",
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "attn_norm": "blocks.0.attn.norm.weight" in state,
        "mlp_norm": "blocks.0.mlp.norm.weight" in state,
    }
    if known.get("rope", "none") != "none" or shown["qk_norm"]:
        # Only there does a bias of the keys change anything.
        shown["key_bias"] = _has_key_bias(state)
    # Its first value matters to a fresh model only.
    scaled = "blocks.0.ls1.gamma" in state
    scale = {"layer_scale": (known.get("layer_scale") or 0.1) if scaled else None}
    return shown | dict(known) | scale


def _gated(state: Mapping[str, Tensor]) -> bool:
    """True if the first layer of an MLP has twice the rows that its second has columns."""
    first, second = state.get("blocks.0.mlp.fc1.weight"), state.get("blocks.0.mlp.fc2.weight")
    return first is not None and second is not None and first.shape[0] == 2 * second.shape[1]


def _may_hide_rope(state: Mapping[str, Tensor]) -> bool:
    """True without any positions, or where keys have no bias beside a gated MLP, as in EVA-02."""
    placeless = "pos_embed" not in state and not any(key.endswith(_TABLE) for key in state)
    return placeless or (_gated(state) and not _has_key_bias(state))


def _has_key_bias(state: Mapping[str, Tensor]) -> bool:
    biases = [value for key, value in state.items() if key.endswith(".attn.qkv.bias")]
    return any(bool(bias.chunk(3)[1].any()) for bias in biases)


def _positions(state: dict[str, Tensor], grid: tuple[int, int]) -> str:
    table = state.get("pos_embed")
    if table is None:
        return "none"
    first, num_patches = int("cls_token" in state), grid[0] * grid[1]
    registers = state.get("reg_token")
    if first and table.shape[1] == num_patches:
        # No position for the class token is one of zeros.
        table = state["pos_embed"] = F.pad(table, (0, 0, 1, 0))
    elif registers is not None and table.shape[1] == first + registers.shape[1] + num_patches:
        # A register's position is always added to it, and so is part of it.
        places = table[:, first:-num_patches]
        state["reg_token"] = registers + places
        table = torch.cat([table[:, :first], table[:, -num_patches:]], dim=1)
        state["pos_embed"] = table
    width = table.shape[2]
    if width % 4 == 0 and table.shape[1] == first + num_patches:
        fixed = sincos_2d(width, grid, num_prefix=first)
        if torch.allclose(table[0], fixed, rtol=0, atol=1e-6):
            return "sincos"
    return "learned"


def _vit_heads(state: Mapping[str, Tensor], width: int) -> int:
    tables = [v for k, v in state.items() if k.endswith(_TABLE)]
    if tables:
        return tables[0].shape[1]
    published = {shape.width: shape.num_heads for shape in VIT_SHAPES.values()} | _OTHER_HEADS
    if width not in published:
        raise BundleError(
            f"weights do not show their attention heads, and width {width} is of no published vit",
            hint="--set encoder.num_heads=…",
        )
    return published[width]


def _vit_size(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """The square input that positions were made for."""
    patch_size = state[_CONV].shape[2]
    tables = [v for k, v in state.items() if k.endswith(_TABLE)]
    if "pos_embed" in state:
        rows, first = state["pos_embed"].shape[1], int("cls_token" in state)
        registers = state["reg_token"].shape[1] if "reg_token" in state else 0
        counts = [rows - first, rows, rows - first - registers]
        sides = [math.isqrt(n) for n in counts if n > 0 and math.isqrt(n) ** 2 == n]
    elif tables:
        offsets = math.isqrt(tables[0].shape[0] - 3)
        sides = [(offsets + 1) // 2] if offsets**2 == tables[0].shape[0] - 3 else []
    else:
        sides = []
    if not sides:
        raise BundleError(
            "weights do not show the size of their input", hint="--set data.image_size=[H,W]"
        )
    return sides[0] * patch_size, sides[0] * patch_size


def _swin(state: Mapping[str, Tensor], known: Mapping[str, Any]) -> dict[str, Any]:
    if known.get("norm_eps", _SWIN_EPS) != _SWIN_EPS:
        raise BundleError(f"its norms have epsilon {known['norm_eps']}; our swin has {_SWIN_EPS}")
    if "patch_embed.norm.weight" not in state:
        raise BundleError("the model does not normalise its patches, as our swin does")
    width, _, patch_size = state[_CONV].shape[:3]
    num_stages = _count(state, "layers")
    tables = [state.get(f"layers.{i}.blocks.0.attn.{_TABLE}") for i in range(num_stages)]
    shapes = [table.shape for table in tables if table is not None]
    if len(shapes) < num_stages:
        raise BundleError("a stage has no relative positions, which our swin has")
    depths = tuple(_count(state, f"layers.{i}.blocks") for i in range(num_stages))
    heads = tuple(shape[1] for shape in shapes)
    named = [n for n, shape in SWIN_SHAPES.items() if shape == (width, depths, heads)]
    shown: dict[str, Any] = {
        "name": named[0] if named else "swin",
        "width": width,
        "depths": depths,
        "num_heads": heads,
        "patch_size": patch_size,
        # A late stage may be smaller than a window.
        "window_size": max((math.isqrt(shape[0]) + 1) // 2 for shape in shapes),
        "mlp_ratio": _mlp_ratio(state.get("layers.0.blocks.0.mlp.fc1.weight"), width),
    }
    return shown | {k: v for k, v in known.items() if k != "norm_eps"}


def _swin_size(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """The square input that the mask of a shifted block was made for."""
    mask = state.get("layers.0.blocks.1.attn_mask")
    if mask is None:
        raise BundleError(
            "weights of a swin do not show the size of their input",
            hint="--set data.image_size=224, or --as NAME for what timm knows",
        )
    side = math.isqrt(mask.shape[0] * mask.shape[1])  # windows x tokens of each
    return side * state[_CONV].shape[2], side * state[_CONV].shape[2]


def beyond_vit(shape: ViTConfig) -> list[str]:
    """Names of an architecture's parts beyond a vit with layer scale and relative positions."""
    return [
        what
        for what, there in {
            f"rotary positions ({shape.rope})": shape.rope != "none",
            f"{shape.num_registers} registers": shape.num_registers > 0,
            "no class token": not shape.class_token,
            f"an MLP of {shape.mlp}": shape.mlp != "gelu",
            f"norms of another kind ({shape.norm})": shape.norm != "layer",
            "norms inside attention": shape.qk_norm or shape.attn_norm,
            "a norm inside the MLP": shape.mlp_norm,
        }.items()
        if there
    ]


def exact_ratio(hidden: int, width: int) -> float:
    """Hidden width over width, such that int(width x ratio) gives the hidden one back."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _mlp_ratio(first: Tensor | None, width: int) -> float:
    return 4.0 if first is None else exact_ratio(first.shape[0], width)


def _count(state: Mapping[str, Tensor], modules: str) -> int:
    """Number of numbered modules."""
    found = [re.match(rf"{re.escape(modules)}\.(\d+)\.", key) for key in state]
    return 1 + max((int(match[1]) for match in found if match), default=-1)
