"""Checkpoints of the papers' own code, and encoders in their style.

Sources of the names: facebookresearch/mae `models_mae.py`, microsoft/unilm `beit/`,
microsoft/SimMIM `models/`, facebookresearch/SlowFast `slowfast/models/masked.py`,
facebookresearch/dinov2 and dinov3 `vision_transformer.py`, baaivision/EVA `EVA-02/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import yaml
from torch import Tensor

from mimray.trainers.convert.foreign_weights import (
    CLIP,
    DINOV3_LICENCE,
    HALF,
    ForeignWeights,
    norm_before_pooling,
    take,
    take_pixel_head,
)
from mimray.trainers.convert.names import (
    ALIASES,
    BEIT,
    inverse,
    join_gates,
    join_qkv,
    rename,
    shift_downsample,
)


def from_official(state: dict[str, Tensor], settings: Mapping[str, Any]) -> ForeignWeights:
    """Recognise a checkpoint by its names.

    Args:
        state: parameters by name, as saved.
        settings: everything else that the file holds.
    """
    state = {k: v for k, v in state.items() if not k.startswith("hogs.")}
    if "storage_tokens" in state or "rope_embed.periods" in state:
        found = _from_dinov3(state)
    elif "rope.freqs_cos" in state:
        found = _from_eva02(state)
    elif "mask_token" in state and state["mask_token"].ndim == 2:
        found = ForeignWeights(state, pooling="cls")  # DINOv2, whose features are the class token's
    elif "decoder_embed.weight" in state:
        found = _from_mae(state, settings.get("args"))
    elif "encoder.mask_token" in state:
        found = _from_simmim(state, settings.get("config"))
    elif "pred_head.projections.0.weight" in state:
        found = _from_maskfeat(state, settings.get("cfg"))
    elif "lm_head.weight" in state:
        found = _from_beit(state)
    else:
        beit_like = any(k.endswith(".attn.q_bias") for k in state)
        found = ForeignWeights(state, tree={"data": HALF if beit_like else {}})
    if found.tree.get("data") is HALF:
        found.notes.append(
            "pictures taken as normalised to [-1, 1], that code's default; its ImageNet-1k runs "
            "were not: --set data.mean=[0.485,0.456,0.406] --set data.std=[0.229,0.224,0.225]"
        )
    found.encoder = our_encoder(found.encoder, found.notes)
    return found


def our_encoder(state: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """A vit, BEiT, EVA or Swin under the names of its own code or of timm's, under ours."""
    state = join_gates(rename(rename(state, inverse(BEIT)), ALIASES))
    if "layers.0.downsample.reduction.weight" in state:
        state = shift_downsample(state, by=1)
    return norm_before_pooling(join_qkv(state), "fc_norm", notes)


def _from_mae(state: dict[str, Tensor], arguments: Any) -> ForeignWeights:
    names = {k: k.replace("decoder_", "decoder.", 1) for k in state if k.startswith("decoder_")}
    rest = take(state, names | {"mask_token": "decoder.mask_token"})
    method: dict[str, Any] = {"name": "mae"}
    found = ForeignWeights(state, rest, {"method": method})
    if rest["decoder.embed.weight"].shape[0] == 512:
        method["decoder_num_heads"] = 16  # as every published one
    if hasattr(arguments, "norm_pix_loss"):
        method["norm_pix_loss"] = arguments.norm_pix_loss
    else:
        found.notes.append(
            "the file does not say whether targets were normalised, taken as not; else "
            "--set method.norm_pix_loss=true"
        )
    return found


def _from_simmim(state: dict[str, Tensor], config: Any) -> ForeignWeights:
    rest = take(state, {"encoder.mask_token": "mask_token"})
    rest |= take_pixel_head(state, "encoder.patch_embed.proj.weight")
    tree: dict[str, dict[str, Any]] = {"method": {"name": "simmim"}}
    if isinstance(config, Mapping):
        data, model = config["DATA"], config["MODEL"]
        tree["data"] = {"image_size": data["IMG_SIZE"]}
        tree["method"] |= {
            "mask_ratio": data["MASK_RATIO"],
            "mask_unit_px": data["MASK_PATCH_SIZE"],
        }
        if model["TYPE"] == "vit":
            tree["encoder"] = {"num_heads": model["VIT"]["NUM_HEADS"]}
    return ForeignWeights({k.removeprefix("encoder."): v for k, v in state.items()}, rest, tree)


def _from_maskfeat(state: dict[str, Tensor], config: Any) -> ForeignWeights:
    rest = take(
        state,
        {
            "mask_token": "mask_token",
            "pred_head.projections.0.weight": "head.weight",
            "pred_head.projections.0.bias": "head.bias",
        },
    )
    norm = {f"pred_head.transforms.0.0.{kind}": f"norm.{kind}" for kind in ("weight", "bias")}
    tree: dict[str, dict[str, Any]] = {"method": {"name": "maskfeat"}}
    if isinstance(config, str):
        settings = yaml.safe_load(config)
        tree["encoder"] = {"num_heads": settings["MVIT"]["NUM_HEADS"]}
        tree["method"]["mask_ratio"] = settings["AUG"]["MASK_RATIO"]
    return ForeignWeights(state | take(state, norm), rest, tree)


def _from_dinov3(state: dict[str, Tensor]) -> ForeignWeights:
    """Its biases have a place for the keys, which a mask takes out."""
    for key in [k for k in state if k.endswith(".attn.qkv.bias")]:
        queries, keys, values = state[key].chunk(3)
        state[key] = torch.cat([queries, torch.zeros_like(keys), values])
    encoder: dict[str, Any] = {"norm_eps": 1e-5, "rope": "dinov3"}
    if "rope_embed.periods" in state:  # one for each four channels of a head
        quarter = state["rope_embed.periods"].numel()
        encoder["num_heads"] = state["cls_token"].shape[2] // (4 * quarter)
    tree: dict[str, dict[str, Any]] = {"encoder": encoder, "data": {"image_size": (256, 256)}}
    return ForeignWeights(state, tree=tree, pooling="cls", license=DINOV3_LICENCE)


def _from_eva02(state: dict[str, Tensor]) -> ForeignWeights:
    head_width = state["rope.freqs_cos"].shape[1]
    encoder = {
        "rope": "eva02",
        "rope_grid": (16, 16),  # of its pre-training, at 224 pixels
        "num_heads": state["cls_token"].shape[2] // head_width,
        "init": "beit",
    }
    return ForeignWeights(state, tree={"encoder": encoder, "data": CLIP})


def _from_beit(state: dict[str, Tensor]) -> ForeignWeights:
    head = {"lm_head.weight": "head.weight", "lm_head.bias": "head.bias"}
    rest = take(state, {"mask_token": "mask_token"} | head)
    tree: dict[str, dict[str, Any]] = {"method": {"name": "beit"}, "encoder": {"init": "beit"}}
    return ForeignWeights(state, rest, {**tree, "data": HALF})
