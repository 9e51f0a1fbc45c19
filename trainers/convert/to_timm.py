"""A bundle in timm's layout. Only files are written; any version of timm may read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from mimray.trainers.bundles import BundleCard, load_bundle
from mimray.trainers.config.model import SwinConfig, ViTConfig
from mimray.trainers.convert.folder import as_json, model_card, write_folder
from mimray.trainers.convert.names import BEIT, rename, split_qkv
from mimray.trainers.errors import BundleError
from mimray.trainers.models.vit import LAYER_NORM_EPS

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
    # Any entry point of a class does: the arguments replace every number of its shape.
    if isinstance(shape, SwinConfig):
        entry, arguments, tokens = "swin_tiny_patch4_window7_224", _swin(shape), "[B, h, w, D]"
    elif isinstance(shape, ViTConfig) and shape.rel_pos_bias == "none":
        entry, arguments = "vit_base_patch16_224", _vit(shape)
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
    return _blocks(shape) | {
        "pos_embed": "none" if shape.positions == "none" else "learn",
        "fc_norm": False,  # the last norm comes before the pooling, as it did here
    }


def _beit(shape: ViTConfig) -> dict[str, Any]:
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
