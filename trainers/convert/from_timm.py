"""Models of timm: a vit, a BEiT or a Swin.

Weights do not show everything, such as the heads of a vit or its activation. What they leave
open is read off timm's own model of that name.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from mimray.trainers.convert.foreign_weights import ForeignWeights
from mimray.trainers.convert.official import our_encoder
from mimray.trainers.errors import BundleError

# timm's classes that our encoders equal, and the blocks of those.
_BLOCKS = {
    "VisionTransformer": "Block",
    "Beit": "Block",
    "SwinTransformer": "SwinTransformerBlock",
}


def from_timm(state: dict[str, Tensor], architecture: str) -> ForeignWeights:
    """Read weights of one of timm's models.

    Args:
        state: parameters by name, as saved.
        architecture: name as `timm.create_model` takes it, with its tag where the weights have one,
            or `local-dir:FOLDER`.

    Raises:
        BundleError: no such model, or one that our encoders are not.
    """
    with torch.device("meta"):  # its shape, without its weights
        model = _create(architecture, pretrained=False)
    return _describe(model, state)


def download_timm(architecture: str) -> ForeignWeights:
    """Fetch a pre-trained model as timm itself does, from its cache or the network.

    Raises:
        BundleError: no such model, no weights to be had, or one that our encoders are not.
    """
    model = _create(architecture, pretrained=True)
    return _describe(model, dict(model.state_dict()))


def _create(architecture: str, pretrained: bool) -> Any:
    try:
        return timm.create_model(architecture, pretrained=pretrained)
    except Exception as error:  # whatever timm, its hub and the network may raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BundleError(
            f"timm cannot give {architecture!r}: {reason}",
            hint="a name of timm.list_models(), with its tag; for weights a network or its cache",
        ) from None


def _describe(model: Any, state: dict[str, Tensor]) -> ForeignWeights:
    kind = type(model).__name__
    blocks = model.layers[0].blocks if kind == "SwinTransformer" else getattr(model, "blocks", [])
    block: Any = blocks[0] if len(blocks) else None
    if _BLOCKS.get(kind) != type(block).__name__:
        raise BundleError(
            f"timm's {kind} of {type(block).__name__} is none of our encoders",
            hint="a plain vit, a beit or a swin",
        )
    activation, norm = block.mlp.act, block.norm1
    if type(activation).__name__ != "GELU" or not isinstance(norm, nn.LayerNorm):
        raise BundleError(
            f"it has {type(activation).__name__} and {type(norm).__name__}; our encoders have "
            "GELU and LayerNorm"
        )
    encoder: dict[str, Any] = {"norm_eps": norm.eps}
    if kind != "SwinTransformer":
        encoder["num_heads"] = block.attn.num_heads
    if kind == "Beit":
        encoder["init"] = "beit"
    found = ForeignWeights(state, tree={"encoder": encoder, "data": _data(model)})
    found.encoder = our_encoder(state, found.notes)
    found.pooling = "cls" if model.global_pool == "token" else "mean"
    return found


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
