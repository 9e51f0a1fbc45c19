"""Parameter names and layouts of other libraries, against ours; read in both directions.

Ours are timm's for a vit and a swin. A name stands for a parameter or for a whole module; `{}`
stands for a number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

# The official BEiT code, which SimMIM's ViT and timm's Beit took over.
BEIT = {
    "blocks.{}.ls1.gamma": "blocks.{}.gamma_1",
    "blocks.{}.ls2.gamma": "blocks.{}.gamma_2",
    "blocks.{}.attn.q.bias": "blocks.{}.attn.q_bias",
    "blocks.{}.attn.v.bias": "blocks.{}.attn.v_bias",
    "blocks.{}.rel_pos_bias.relative_position_bias_table": (
        "blocks.{}.attn.relative_position_bias_table"
    ),
}

# Theirs to ours, as official code of DINOv2, DINOv3 and EVA-02 has them, and timm's Eva. The first
# layer of a gated MLP, where it comes in two parts, is `gate` and `value` until `join_gates`.
ALIASES = {"register_tokens": "reg_token", "storage_tokens": "reg_token"} | {
    f"blocks.{{}}.{theirs}": f"blocks.{{}}.{ours}"
    for theirs, ours in {
        "attn.q_proj": "attn.q",
        "attn.k_proj": "attn.k",
        "attn.v_proj": "attn.v",
        "attn.inner_attn_ln": "attn.norm",
        "mlp.ffn_ln": "mlp.norm",
        "mlp.w12": "mlp.fc1",
        "mlp.w1": "mlp.gate",
        "mlp.w2": "mlp.value",
        "mlp.w3": "mlp.fc2",
        "mlp.fc1_g": "mlp.gate",
        "mlp.fc1_x": "mlp.value",
    }.items()
}

# Published transformers checkpoints, which every version of it reads: ViT, ViTMAE and Beit.
_HF_BLOCK = {
    "norm1": "layernorm_before",
    "attn.q": "attention.attention.query",
    "attn.k": "attention.attention.key",
    "attn.v": "attention.attention.value",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "ls1.gamma": "lambda_1",
    "ls2.gamma": "lambda_2",
    "rel_pos_bias": "attention.attention.relative_position_bias",
}
HF_VIT = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "rel_pos_bias": "encoder.relative_position_bias",
    "norm": "layernorm",
} | {f"blocks.{{}}.{ours}": f"encoder.layer.{{}}.{theirs}" for ours, theirs in _HF_BLOCK.items()}
HF_DINOV2 = {
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
} | {
    f"blocks.{{}}.{ours}": f"encoder.layer.{{}}.{theirs}"
    for ours, theirs in {
        "norm1": "norm1",
        "attn.q": "attention.attention.query",
        "attn.k": "attention.attention.key",
        "attn.v": "attention.attention.value",
        "attn.proj": "attention.output.dense",
        "ls1.gamma": "layer_scale1.lambda1",
        "norm2": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "ls2.gamma": "layer_scale2.lambda1",
    }.items()
}
HF_DINOV2_GATED = HF_DINOV2 | {
    "blocks.{}.mlp.fc1": "encoder.layer.{}.mlp.weights_in",
    "blocks.{}.mlp.fc2": "encoder.layer.{}.mlp.weights_out",
}
HF_DINOV3 = {
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens",
    "patch_embed.proj": "embeddings.patch_embeddings",
    "norm": "norm",
} | {
    f"blocks.{{}}.{ours}": f"layer.{{}}.{theirs}"
    for ours, theirs in {
        "norm1": "norm1",
        "attn.q": "attention.q_proj",
        "attn.k": "attention.k_proj",
        "attn.v": "attention.v_proj",
        "attn.proj": "attention.o_proj",
        "ls1.gamma": "layer_scale1.lambda1",
        "norm2": "norm2",
        "mlp.fc1": "mlp.up_proj",
        "mlp.fc2": "mlp.down_proj",
        "ls2.gamma": "layer_scale2.lambda1",
    }.items()
}
HF_DINOV3_GATED = {k: v for k, v in HF_DINOV3.items() if k != "blocks.{}.mlp.fc1"} | {
    "blocks.{}.mlp.gate": "layer.{}.mlp.gate_proj",
    "blocks.{}.mlp.value": "layer.{}.mlp.up_proj",
}
HF_SIGLIP = {
    "pos_embed": "embeddings.position_embedding.weight",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
} | {
    f"blocks.{{}}.{ours}": f"encoder.layers.{{}}.{theirs}"
    for ours, theirs in {
        "norm1": "layer_norm1",
        "attn.q": "self_attn.q_proj",
        "attn.k": "self_attn.k_proj",
        "attn.v": "self_attn.v_proj",
        "attn.proj": "self_attn.out_proj",
        "norm2": "layer_norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }.items()
}
HF_DECODER = {
    "decoder.embed": "decoder.decoder_embed",
    "decoder.mask_token": "decoder.mask_token",
    "decoder.pos_embed": "decoder.decoder_pos_embed",
    "decoder.norm": "decoder.decoder_norm",
    "decoder.pred": "decoder.decoder_pred",
} | {
    f"decoder.blocks.{{}}.{ours}": f"decoder.decoder_layers.{{}}.{theirs}"
    for ours, theirs in _HF_BLOCK.items()
}
HF_SWIN = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "patch_embed.norm": "embeddings.norm",
    "norm": "layernorm",
    "layers.{}.downsample.norm": "encoder.layers.{}.downsample.norm",
    "layers.{}.downsample.reduction": "encoder.layers.{}.downsample.reduction",
} | {
    f"layers.{{}}.blocks.{{}}.{ours}": f"encoder.layers.{{}}.blocks.{{}}.{theirs}"
    for ours, theirs in {
        "norm1": "layernorm_before",
        "attn": "attention.self",
        "attn.q": "attention.self.query",
        "attn.k": "attention.self.key",
        "attn.v": "attention.self.value",
        "attn.proj": "attention.output.dense",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }.items()
}

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def inverse(names: Mapping[str, str]) -> dict[str, str]:
    """Invert a mapping of names: theirs to ours out of ours to theirs."""
    return {theirs: ours for ours, theirs in names.items()}


def rename(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """A state under other names.

    Args:
        state: parameters by name.
        names: old to new, of parameters or of the modules that hold them; what is not named
            there keeps its name.
    """
    renamed = {}
    for key, value in state.items():
        template = _NUMBER.sub("{}", key)
        module, _, leaf = template.rpartition(".")
        if template in names:
            template = names[template]
        elif module in names:
            template = f"{names[module]}.{leaf}"
        renamed[template.format(*_NUMBER.findall(key))] = value
    return renamed


def shift_downsample(state: Mapping[str, Tensor], by: int) -> dict[str, Tensor]:
    """Move Swin's patch merging between stages.

    The official code and transformers merge at the end of a stage, timm and we at the start of
    the next.

    Args:
        state: parameters of a Swin.
        by: 1 from the official place to ours, -1 back.
    """
    pattern = re.compile(r"(?<=layers\.)\d+(?=\.downsample\.)")
    return {pattern.sub(lambda m: str(int(m[0]) + by), k): v for k, v in state.items()}


def split_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Joint `attn.qkv` projections as `attn.q`, `attn.k` and `attn.v`."""
    split = {}
    for key, value in state.items():
        module, joint, kind = key.partition(".attn.qkv.")
        if joint:
            for name, third in zip("qkv", value.chunk(3), strict=True):
                split[f"{module}.attn.{name}.{kind}"] = third
        else:
            split[key] = value
    return split


def join_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `split_qkv`.

    Where a model has no bias at all, or as BEiT none of its keys, zeros stand in, which is the
    same. One that a single block lacks stays missing.
    """
    joined = dict(state)
    some_bias = any(k.endswith((".attn.qkv.bias", ".attn.q.bias")) for k in state)
    some_key_bias = any(k.endswith(".attn.k.bias") for k in state)
    for attn in {k[: k.index(".attn.") + 6] for k in state if ".attn." in k}:
        parts = [f"{attn}{name}" for name in "qkv"]
        if all(f"{part}.weight" in joined for part in parts):
            joined[f"{attn}qkv.weight"] = torch.cat([joined.pop(f"{p}.weight") for p in parts])
        weight = joined.get(f"{attn}qkv.weight")
        if weight is None or f"{attn}qkv.bias" in joined:
            continue
        zero = weight.new_zeros(weight.shape[0] // 3)
        if not some_bias:
            joined[f"{attn}qkv.bias"] = torch.cat([zero, zero, zero])
            continue
        if not some_key_bias:
            joined[f"{attn}k.bias"] = zero
        if all(f"{part}.bias" in joined for part in parts):
            joined[f"{attn}qkv.bias"] = torch.cat([joined.pop(f"{p}.bias") for p in parts])
    return joined


def join_gates(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The two parts of a gated MLP's first layer, `mlp.gate` and `mlp.value`, as one `mlp.fc1`.

    Where a block has one part alone, it stays as it is.
    """
    joined = dict(state)
    for key in state:
        value = key.replace(".mlp.gate.", ".mlp.value.")
        if value != key and value in joined:
            parts = joined.pop(key), joined.pop(value)
            joined[key.replace(".mlp.gate.", ".mlp.fc1.")] = torch.cat(parts)
    return joined


def split_gates(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `join_gates`, for a state whose MLPs are all gated."""
    split = {}
    for key, value in state.items():
        if ".mlp.fc1." in key:
            for name, half in zip(("gate", "value"), value.chunk(2), strict=True):
                split[key.replace(".mlp.fc1.", f".mlp.{name}.")] = half
        else:
            split[key] = value
    return split


def without_key_bias(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split projections without a bias of the keys.

    It adds the same to every score of a query, which the softmax cancels.
    """
    return {k: v for k, v in state.items() if not k.endswith(".attn.k.bias")}


def to_pixel_shuffle(head: Float[Tensor, P * D], channels: int) -> Float[Tensor, P * D]:
    """Rows of a head that predicts (row, column, channel), as (channel, row, column).

    Args:
        head: weight or bias of a Linear.
        channels: channels of the pictures.
    """
    side = math.isqrt(head.shape[0] // channels)
    pixels = head.reshape(side, side, channels, *head.shape[1:])
    return pixels.movedim(2, 0).flatten(0, 2)


def from_pixel_shuffle(head: Float[Tensor, P * D], channels: int) -> Float[Tensor, P * D]:
    """The inverse of `to_pixel_shuffle`."""
    side = math.isqrt(head.shape[0] // channels)
    pixels = head.reshape(channels, side, side, *head.shape[1:])
    return pixels.movedim(0, 2).flatten(0, 2)
