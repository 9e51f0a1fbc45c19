"""Models of timm: a vit, a BEiT, an EVA or a Swin.

Weights do not show everything, such as the heads of a vit or its activation. What they leave
open is read off timm's own model of that name.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from mimray.trainers.convert.foreign_weights import (
    DINOV3_LICENCE,
    NO_ATTENTION_POOLING,
    ForeignWeights,
)
from mimray.trainers.convert.official import our_encoder
from mimray.trainers.errors import BundleError, NoCheckpointError

# timm's classes that our encoders equal, with their blocks' and attention's.
_BLOCKS = {
    "VisionTransformer": ("Block", "Attention"),
    "Beit": ("Block", "Attention"),
    "Eva": ("EvaBlock", "EvaAttention"),
    "SwinTransformer": ("SwinTransformerBlock", "WindowAttention"),
}
_ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh"}


def from_timm(state: dict[str, Tensor], architecture: str) -> ForeignWeights:
    """Read weights of one of timm's models.

    Args:
        state: parameters by name, as saved.
        architecture: name as `timm.create_model` takes it, with its tag where the weights have one,
            or `local-dir:FOLDER`.

    Raises:
        NoCheckpointError: no such model.
        BundleError: a model that is none of our encoders.
    """
    with torch.device("meta"):  # its shape, without its weights
        model = _create(architecture, pretrained=False)
    return _describe(model, state, architecture)


def download_timm(architecture: str) -> ForeignWeights:
    """Fetch a pre-trained model as timm itself does, from its cache or the network.

    Raises:
        NoCheckpointError: no such model, or no weights to be had.
        BundleError: a model that is none of our encoders.
    """
    model = _create(architecture, pretrained=True)
    found = _describe(model, dict(model.state_dict()), architecture)
    found.license = found.license or model.pretrained_cfg.get("license") or ""
    return found


def _create(architecture: str, pretrained: bool) -> Any:
    try:
        return timm.create_model(architecture, pretrained=pretrained)
    except Exception as error:  # whatever timm, its hub and the network may raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NoCheckpointError(
            f"timm cannot give {architecture!r}: {reason}",
            hint="a name of timm.list_models(), with its tag; for weights a network or its cache",
        ) from None


def _describe(model: Any, state: dict[str, Tensor], architecture: str) -> ForeignWeights:
    kind = type(model).__name__
    blocks = model.layers[0].blocks if kind == "SwinTransformer" else getattr(model, "blocks", [])
    block: Any = blocks[0] if len(blocks) else None
    names = (type(block).__name__, type(getattr(block, "attn", None)).__name__)
    if _BLOCKS.get(kind) != names:
        raise BundleError(
            f"timm's {kind} of {names[0]} with {names[1]} is none of our encoders",
            hint="a plain vit, a beit, an eva or a swin",
        )
    encoder: dict[str, Any] = {"norm_eps": _norm_eps(block), **_mlp(block.mlp)}
    if kind != "SwinTransformer":
        encoder |= {"num_heads": block.attn.num_heads, **_rope(model)}
    if kind == "Beit":
        encoder["init"] = "beit"
    found = ForeignWeights(state, tree={"encoder": encoder, "data": _data(model)})
    found.encoder = our_encoder(state, found.notes)
    if "dinov3" in (model.pretrained_cfg.get("architecture") or architecture):
        found.license = DINOV3_LICENCE
    if model.global_pool == "map":
        found.notes.append(NO_ATTENTION_POOLING)
    found.pooling = "cls" if model.global_pool == "token" else "mean"
    return found


def _norm_eps(block: Any) -> float:
    norm = block.norm1
    if not isinstance(norm, nn.LayerNorm) and type(norm).__name__ != "RmsNorm":
        raise BundleError(f"it has {type(norm).__name__}; our encoders have LayerNorm or RMSNorm")
    eps: float = norm.eps
    return eps


def _mlp(mlp: Any) -> dict[str, Any]:
    """The recipe's key `mlp`, or nothing for what every encoder has."""
    kind, activation = type(mlp).__name__, type(mlp.act).__name__
    if kind == "Mlp" and activation in _ACTIVATIONS:
        approximate = getattr(mlp.act, "approximate", "none")
        tanh = _ACTIVATIONS[activation] == "gelu_tanh" or approximate == "tanh"
        return {"mlp": "gelu_tanh"} if tanh else {}
    gate_first = kind == "SwiGLU" or (kind == "GluMlp" and not mlp.gate_last)
    if gate_first and activation == "SiLU":
        return {"mlp": "swiglu"}
    raise BundleError(
        f"its MLP is {kind} with {activation}; our encoders have GELU, or SwiGLU, the gate first"
    )


def _rope(model: Any) -> dict[str, Any]:
    """The recipe's keys of rotary positions."""
    rope = getattr(model, "rope", None)
    if rope is None:
        return {"rope": "none"}
    kind = type(rope).__name__
    by_rows = rope.grid_indexing == "ij" and not getattr(rope, "grid_offset", 0)
    centred = kind == "RotaryEmbeddingDinoV3" and rope.rotate_half
    if centred and by_rows and rope.normalize_coords == "separate" and rope.min_period is None:
        return {"rope": "dinov3", "rope_temperature": rope.temperature}
    counted = kind == "RotaryEmbeddingCat" and not rope.rotate_half and not rope.in_pixels
    if counted and by_rows and rope.grid_type == "index":
        grid = rope.ref_feat_shape
        return {"rope": "eva02", "rope_temperature": rope.temperature, "rope_grid": grid}
    raise BundleError(
        f"its rotary positions ({kind}) are of another kind than our vit's",
        hint="DINOv3's or EVA-02's",
    )


def _data(model: Any) -> dict[str, Any]:
    """The recipe's section `data`."""
    config = model.pretrained_cfg
    data = {
        "image_size": model.patch_embed.img_size,
        "mean": config["mean"],
        "std": config["std"],
    }
    if config["interpolation"] in ("bicubic", "bilinear"):
        data["interpolation"] = config["interpolation"]
    return data
