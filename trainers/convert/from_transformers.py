"""Folders of Hugging Face transformers, whose model types `_READERS` lists.

The library is not needed; `config.json` says it all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mimray.trainers.convert.foreign_weights import (
    DINOV3_LICENCE,
    HALF,
    NO_ATTENTION_POOLING,
    ForeignWeights,
    norm_before_pooling,
    take,
    take_pixel_head,
)
from mimray.trainers.convert.names import (
    HF_DECODER,
    HF_DINOV2,
    HF_DINOV2_GATED,
    HF_DINOV3,
    HF_DINOV3_GATED,
    HF_SIGLIP,
    HF_SWIN,
    HF_VIT,
    inverse,
    join_gates,
    join_qkv,
    rename,
    shift_downsample,
)
from mimray.trainers.errors import BundleError

_SIGLIP = ("siglip_vision_model", "siglip2_vision_model")
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
    if kind in ("siglip", "siglip2"):  # of two towers
        kind = f"{kind}_vision_model"
        config = {**(config.get("vision_config") or {}), "model_type": kind}
        state = {k: v for k, v in state.items() if k.startswith("vision_model.")}
    if kind not in _READERS:
        raise BundleError(
            f"model type {kind!r} of transformers is not one of {', '.join(_READERS)}"
        )
    inner = _without_prefix(state, kind)
    found = _READERS[kind](inner, config)
    found.tree["encoder"] = found.tree.get("encoder", {}) | _activation(kind, config)
    if kind != "swin":
        found.tree["encoder"].setdefault("rope", "none")
    found.tree["encoder"] |= _present(
        config,
        num_heads="num_heads" if kind == "swin" else "num_attention_heads",
        norm_eps="layer_norm_eps",
    )
    found.tree["data"] = _data(config, preprocessor)
    return found


def _without_prefix(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """A state under the names inside the model, whichever class with a head wrote it."""
    prefix = {"vit_mae": "vit."}.get(kind, f"{kind}.")
    if kind.endswith("_vision_model"):
        prefix = "vision_model."
    inner = {k.removeprefix(prefix): v for k, v in state.items()}
    if len(inner) < len(state):
        raise BundleError(f"{kind}.layernorm and layernorm: our encoders have one last norm")
    return inner


def _activation(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's key `mlp`, or nothing for what every encoder has."""
    gated = config.get("use_gated_mlp") or config.get("use_swiglu_ffn")
    default = "gelu_pytorch_tanh" if kind.endswith("_vision_model") else "gelu"
    name = config.get("hidden_act", default)
    if kind.startswith("dinov2") and gated:
        return {"mlp": "swiglu"}  # whatever its configuration says, it takes silu
    known = {"silu": "swiglu"} if gated else {"gelu": "gelu"}
    if kind.startswith(("dinov", "siglip", "vit")) and not gated:
        known |= {"gelu_pytorch_tanh": "gelu_tanh"}
    if name not in known:
        raise BundleError(
            f"its activation is {name!r}; our encoders have {' or '.join(known)} there"
        )
    return {} if known[name] == "gelu" else {"mlp": known[name]}


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


def _from_dinov2(state: dict[str, Tensor], config: Mapping[str, Any]) -> ForeignWeights:
    names = HF_DINOV2_GATED if config.get("use_swiglu_ffn") else HF_DINOV2
    return ForeignWeights(join_qkv(rename(state, inverse(names))), pooling="cls")


def _from_dinov3(state: dict[str, Tensor], config: Mapping[str, Any]) -> ForeignWeights:
    # Version 5 may write the blocks within `model`.
    state = {k.removeprefix("model."): v for k, v in state.items()}
    names = HF_DINOV3_GATED if config.get("use_gated_mlp") else HF_DINOV3
    state = join_gates(join_qkv(rename(state, inverse(names))))
    if "reg_token" in state and not state["reg_token"].shape[1]:
        del state["reg_token"]
    theta = (config.get("rope_parameters") or config).get("rope_theta", 100.0)
    encoder = {"rope": "dinov3", "rope_temperature": theta, "norm_eps": 1e-5}
    return ForeignWeights(state, tree={"encoder": encoder}, pooling="cls", license=DINOV3_LICENCE)


def _from_siglip(state: dict[str, Tensor], config: Mapping[str, Any]) -> ForeignWeights:
    state = join_qkv(rename(state, inverse(HF_SIGLIP)))
    if "pos_embed" in state:
        state["pos_embed"] = state["pos_embed"].unsqueeze(0)
    patches = state.get("patch_embed.proj.weight")
    if patches is not None and patches.ndim == 2:  # of flat patches (row, column, channel)
        side = config.get("patch_size", 16)
        square = patches.reshape(len(patches), side, side, -1)
        state["patch_embed.proj.weight"] = square.permute(0, 3, 1, 2).contiguous()
    found = ForeignWeights(state, tree={"encoder": {"num_heads": 12}})
    if any(k.startswith("head.") for k in state):
        found.notes.append(NO_ATTENTION_POOLING)
    return found


def _data(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's section `data`."""
    data: dict[str, Any] = {}
    if config["model_type"] in ("vit", "beit", *_SIGLIP):
        data |= HALF  # what their processors do unless told otherwise
    data |= _present(preprocessor, mean="image_mean", std="image_std")
    if preprocessor.get("resample") in _INTERPOLATION:
        data["interpolation"] = _INTERPOLATION[preprocessor["resample"]]
    return data | _present(config, image_size="image_size")


def _present(config: Mapping[str, Any], **names: str) -> dict[str, Any]:
    """Values of the keys that a configuration has, under our names."""
    return {ours: config[theirs] for ours, theirs in names.items() if theirs in config}


_READERS = {
    "vit_mae": _from_vit_mae,
    "beit": _from_beit,
    "swin": _from_swin,
    "vit": _from_vit,
    "dinov2": _from_dinov2,
    "dinov2_with_registers": _from_dinov2,
    "dinov3_vit": _from_dinov3,
    **dict.fromkeys(_SIGLIP, _from_siglip),
}
