"""Folders of Hugging Face transformers: model types vit_mae, beit, swin and vit.

The library is not needed; `config.json` says it all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mimray.trainers.convert.foreign_weights import (
    HALF,
    ForeignWeights,
    norm_before_pooling,
    take,
    take_pixel_head,
)
from mimray.trainers.convert.names import (
    HF_DECODER,
    HF_SWIN,
    HF_VIT,
    inverse,
    join_qkv,
    rename,
    shift_downsample,
)
from mimray.trainers.errors import BundleError

_INTERPOLATION = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def from_transformers(
    state: dict[str, Tensor], config: Mapping[str, Any], preprocessor: Mapping[str, Any]
) -> ForeignWeights:
    """Read a folder's weights by its configuration.

    Args:
        state: parameters by name, as saved.
        config: `config.json`.
        preprocessor: `preprocessor_config.json`; empty where there is none.

    Raises:
        BundleError: a model type or an option that our encoders do not have.
    """
    kind = config["model_type"]
    readers = {"vit_mae": _from_vit_mae, "beit": _from_beit, "swin": _from_swin, "vit": _from_vit}
    if kind not in readers:
        raise BundleError(f"model type {kind!r} of transformers is not one of {', '.join(readers)}")
    if config.get("hidden_act", "gelu") != "gelu":
        raise BundleError(f"its activation is {config['hidden_act']!r}; our encoders have gelu")
    prefix = "vit." if kind == "vit_mae" else f"{kind}."
    inner = {k.removeprefix(prefix): v for k, v in state.items()}
    if len(inner) < len(state):
        raise BundleError(f"{kind}.layernorm and layernorm: our encoders have one last norm")
    found = readers[kind](inner, config)
    found.tree["encoder"] = found.tree.get("encoder", {}) | _present(
        config,
        num_heads="num_heads" if kind == "swin" else "num_attention_heads",
        norm_eps="layer_norm_eps",
    )
    found.tree["data"] = _data(config, preprocessor)
    return found


def _from_vit_mae(state: dict[str, Tensor], config: Mapping[str, Any]) -> ForeignWeights:
    # Version 5 writes the decoder's layers by another name than all published files have.
    state = {k.replace("decoder_encoder.layer.", "decoder_layers."): v for k, v in state.items()}
    state = join_qkv(rename(state, inverse(HF_VIT | HF_DECODER)))
    decoder = take(state, {k: k for k in state if k.startswith("decoder.")})
    method = {"name": "mae"} | _present(
        config,
        decoder_num_heads="decoder_num_attention_heads",
        norm_pix_loss="norm_pix_loss",
        mask_ratio="mask_ratio",
    )
    return ForeignWeights(state, decoder, {"method": method})


def _from_vit(state: dict[str, Tensor], config: Mapping[str, Any]) -> ForeignWeights:
    found = _with_pixel_head(state)
    # Its classifiers and its pooler read the class token.
    if any(k.startswith(("classifier.", "pooler.")) for k in state):
        found.pooling = "cls"
    found.encoder = join_qkv(rename(found.encoder, inverse(HF_VIT)))
    return found


def _from_swin(state: dict[str, Tensor], config: Mapping[str, Any]) -> ForeignWeights:
    found = _with_pixel_head(state)
    found.encoder = shift_downsample(join_qkv(rename(found.encoder, inverse(HF_SWIN))), by=1)
    return found


def _with_pixel_head(state: dict[str, Tensor]) -> ForeignWeights:
    """A SimMIM, where the weights hold its head."""
    if "decoder.0.weight" not in state:
        return ForeignWeights(state)
    rest = take(state, {"embeddings.mask_token": "mask_token"})
    rest |= take_pixel_head(state, "embeddings.patch_embeddings.projection.weight")
    return ForeignWeights(state, rest, {"method": {"name": "simmim"}})


def _from_beit(state: dict[str, Tensor], config: Mapping[str, Any]) -> ForeignWeights:
    encoder = {"init": "beit", "layer_scale": config.get("layer_scale_init_value") or None}
    found = ForeignWeights(state, tree={"encoder": encoder})
    if "lm_head.weight" in state:
        found.method = take(
            state,
            {
                "embeddings.mask_token": "mask_token",
                "lm_head.weight": "head.weight",
                "lm_head.bias": "head.bias",
            },
        )
        found.tree["method"] = {"name": "beit"}
    elif not config.get("use_mean_pooling", True):
        found.pooling = "cls"
    state = join_qkv(rename(state, inverse(HF_VIT)))
    found.encoder = norm_before_pooling(state, "pooler.layernorm", found.notes)
    return found


def _data(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's section `data`."""
    data: dict[str, Any] = {}
    if config["model_type"] in ("vit", "beit"):
        data |= HALF  # what their processors do unless told otherwise
    data |= _present(preprocessor, mean="image_mean", std="image_std")
    if preprocessor.get("resample") in _INTERPOLATION:
        data["interpolation"] = _INTERPOLATION[preprocessor["resample"]]
    return data | _present(config, image_size="image_size")


def _present(config: Mapping[str, Any], **names: str) -> dict[str, Any]:
    """Values of the keys that a configuration has, under our names."""
    return {ours: config[theirs] for ours, theirs in names.items() if theirs in config}
