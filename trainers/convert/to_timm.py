"""A bundle in timm's layout. Only files are written; any version of timm may read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from mimray.trainers.bundles import BundleCard, load_bundle
from mimray.trainers.config.model import SwinConfig, ViTConfig
from mimray.trainers.convert.folder import as_json, model_card, write_folder
from mimray.trainers.convert.names import BEIT, rename, split_gates, split_qkv
from mimray.trainers.convert.shapes import beyond_vit, exact_ratio
from mimray.trainers.errors import BundleError
from mimray.trainers.models.vit import LAYER_NORM_EPS

# Entry points of timm's Eva, by the epsilon of their norms.
_EVA = {1e-5: "vit_small_patch16_dinov3", 1e-6: "eva02_small_patch14_224"}
_GATES = {"blocks.{}.mlp.gate": "blocks.{}.mlp.fc1_g", "blocks.{}.mlp.value": "blocks.{}.mlp.fc1_x"}
_USAGE = """\
import timm

model = timm.create_model("local-dir:PATH/TO/THIS/FOLDER", pretrained=True).eval()
tokens = model.forward_features(images)  # {tokens}
pooled = model(images)  # [B, D]"""


def export_timm(bundle: Path, out: Path) -> str:
    """Write a folder that `timm.create_model("local-dir:OUT", pretrained=True)` loads.

    The model has no classifier; calling it gives the card's pooling of the normalised tokens,
    `forward_features` the tokens themselves, in a vit the class token first.

    Args:
        bundle: a bundle's folder, or a run's that holds one.
        out: the folder to write; new or empty.

    Returns:
        timm's name of the kind of model.

    Raises:
        BundleError: no sound bundle there, one that timm cannot hold, or `out` holds files.
        StorageError: `out` cannot be written.
    """
    frozen = load_bundle(bundle)
    card, state = frozen.card, frozen.encoder.state_dict()
    shape, tokens = card.encoder, "[B, 1 + N, D], class token first"
    if isinstance(shape, ViTConfig) and (shape.num_registers or not shape.class_token):
        tokens = f"[B, {shape.num_prefix_tokens} + N, D], those of the patches last"
    # Any entry point of a class does: the arguments replace every number of its shape.
    if isinstance(shape, SwinConfig):
        entry, arguments, tokens = "swin_tiny_patch4_window7_224", _swin(shape), "[B, h, w, D]"
    elif isinstance(shape, ViTConfig) and shape.rope != "none":
        entry, arguments, state = (
            _EVA.get(shape.norm_eps, ""),
            _eva(shape, state),
            _as_eva(shape, state),
        )
    elif isinstance(shape, ViTConfig) and shape.rel_pos_bias == "none":
        # An entry whose MLP is gated, since a file of JSON cannot name that.
        entry = "vit_giant_patch14_dinov2" if shape.mlp == "swiglu" else "vit_base_patch16_224"
        arguments, state = _vit(shape), _with_places_of_patches(shape, state)
    elif isinstance(shape, ViTConfig):
        entry, arguments, state = "beit_base_patch16_224", _beit(shape), _as_beit(state)
    else:
        raise BundleError(
            f"timm has no encoder {shape.name}; it holds vit and swin", hint="export the bundle"
        )
    files = {
        "config.json": as_json(_config(card, entry, arguments)),
        "README.md": model_card(
            card, "timm", "the encoder alone, without classifier", _USAGE.format(tokens=tokens)
        ),
    }
    write_folder(out, state, files)
    return entry.partition("_")[0]


def _swin(shape: SwinConfig) -> dict[str, Any]:
    return {
        "patch_size": shape.patch_size,
        "embed_dim": shape.width,
        "depths": list(shape.depths),
        "num_heads": list(shape.num_heads),
        "window_size": shape.window_size,
        "mlp_ratio": shape.mlp_ratio,
    }


def _vit(shape: ViTConfig) -> dict[str, Any]:
    arguments = _blocks(shape) | {
        "pos_embed": "none" if shape.positions == "none" else "learn",
        "fc_norm": False,  # the last norm comes before the pooling, as it did here
    }
    if shape.mlp == "gelu_tanh":
        arguments["act_layer"] = "gelu_tanh"
    if shape.mlp == "swiglu":
        arguments["mlp_ratio"] = exact_ratio(2 * int(shape.width * shape.mlp_ratio), shape.width)
    if shape.norm == "rms":
        arguments["norm_layer"] = "rmsnorm"
    norms = {
        "qk_norm": shape.qk_norm,
        "scale_attn_norm": shape.attn_norm,
        "scale_mlp_norm": shape.mlp_norm,
    }
    tokens = {
        "class_token": shape.class_token,
        "reg_tokens": shape.num_registers,
        "no_embed_class": _places_are_of_patches(shape),
    }
    plain = {"class_token": True, "reg_tokens": 0, "no_embed_class": False}
    return arguments | {
        key: value for key, value in (norms | tokens).items() if value != plain.get(key, False)
    }


def _places_are_of_patches(shape: ViTConfig) -> bool:
    """True where timm's table of positions has no row for the tokens before the patches."""
    return bool(shape.num_registers) or not shape.class_token


def _with_places_of_patches(shape: ViTConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The class token's position as part of it, where timm's table has no row for it."""
    if "pos_embed" not in state or not (shape.class_token and _places_are_of_patches(shape)):
        return state
    table = state["pos_embed"]
    return state | {
        "cls_token": state["cls_token"] + table[:, :1],
        "pos_embed": table[:, 1:],
    }


def _eva(shape: ViTConfig, state: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments of timm's Eva, which has rotary positions."""
    if shape.norm_eps not in _EVA:
        raise BundleError(
            f"its norms have epsilon {shape.norm_eps}, timm's Eva {' or '.join(map(str, _EVA))}",
            hint="export the bundle",
        )
    biases = [value for key, value in state.items() if key.endswith(".attn.qkv.bias")]
    if shape.mlp == "gelu_tanh" or shape.norm == "rms":
        raise BundleError(
            f"its MLP is {shape.mlp} and its norm {shape.norm}; timm's Eva, which has rotary "
            "positions, holds gelu or swiglu and LayerNorm",
            hint="export the bundle",
        )
    if any(bool(bias.chunk(3)[1].any()) for bias in biases):
        raise BundleError(
            "its keys have a bias, which those of timm's Eva have not", hint="export the bundle"
        )
    defaults = {"dinov3": 100.0, "eva02": 10000.0}
    return _shape(shape) | {
        "qkv_bias": True,
        "qkv_fused": True,
        "qk_norm": shape.qk_norm,
        "swiglu_mlp": shape.mlp == "swiglu",
        "swiglu_align_to": 0,
        "scale_mlp": shape.mlp_norm,
        "scale_attn_inner": shape.attn_norm,
        "class_token": shape.class_token,
        "num_reg_tokens": shape.num_registers,
        "no_embed_class": _places_are_of_patches(shape),
        "use_abs_pos_emb": shape.positions != "none",
        "use_rot_pos_emb": True,
        "rope_type": "dinov3" if shape.rope == "dinov3" else "cat",
        "rope_temperature": shape.rope_temperature or defaults[shape.rope],
        "rope_rotate_half": shape.rope == "dinov3",
        "ref_feat_shape": shape.rope_grid and list(shape.rope_grid),
        "use_fc_norm": False,
        "use_post_transformer_norm": True,
        "dynamic_img_size": False,
    }


def _as_eva(shape: ViTConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of timm's Eva, whose gated MLP has two parts where it has a norm."""
    state = _with_places_of_patches(shape, state)
    gated = shape.mlp == "swiglu" and shape.mlp_norm
    return _as_beit(state if not gated else rename(split_gates(state), _GATES))


def _beit(shape: ViTConfig) -> dict[str, Any]:
    beyond = beyond_vit(shape)
    if beyond:
        raise BundleError(
            f"it has {' and '.join(beyond)} beside relative positions, which timm's Beit has not",
            hint="export the bundle",
        )
    return _blocks(shape) | {
        "use_abs_pos_emb": shape.positions != "none",
        "use_rel_pos_bias": shape.rel_pos_bias == "per_block",
        "use_shared_rel_pos_bias": shape.rel_pos_bias == "shared",
        "use_fc_norm": False,
    }


def _blocks(shape: ViTConfig) -> dict[str, Any]:
    if shape.norm_eps != LAYER_NORM_EPS:
        raise BundleError(
            f"its norms have epsilon {shape.norm_eps}, timm's {LAYER_NORM_EPS}",
            hint=f"import it with --set encoder.norm_eps={LAYER_NORM_EPS}, if the difference "
            "is of no matter",
        )
    return _shape(shape)


def _shape(shape: ViTConfig) -> dict[str, Any]:
    return {
        "patch_size": shape.patch_size,
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": shape.num_heads,
        "mlp_ratio": shape.mlp_ratio,
        "init_values": shape.layer_scale,
    }


def _as_beit(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of timm's Beit, which has one qkv weight and no bias of the keys."""
    split = split_qkv(state)
    biases = {k: v for k, v in split.items() if k.endswith((".attn.q.bias", ".attn.v.bias"))}
    joint = {k: v for k, v in state.items() if not k.endswith(".attn.qkv.bias")}
    return rename(joint | biases, BEIT)


def _config(card: BundleCard, entry: str, arguments: dict[str, Any]) -> dict[str, Any]:
    pool = "avg" if card.pooling == "mean" else "token"
    return {
        "architecture": entry,
        "num_classes": 0,
        "num_features": card.encoder.out_width,
        "global_pool": pool,
        "model_args": {
            "img_size": list(card.image_size),
            "in_chans": card.channels,
            "num_classes": 0,
            "global_pool": pool,
            **arguments,
        },
        "pretrained_cfg": {
            "tag": "mimray",
            "custom_load": False,
            "input_size": [card.channels, *card.image_size],
            "fixed_input_size": True,
            "interpolation": card.interpolation,
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": list(card.mean),
            "std": list(card.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
