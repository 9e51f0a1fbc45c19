"""A bundle in the layout of Hugging Face transformers, which need not be installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from mimray.trainers.bundles import METHOD, BundleCard, bundle_folder, load_bundle, verify_weights
from mimray.trainers.config.beit import BEiTConfig
from mimray.trainers.config.mae import MAEConfig
from mimray.trainers.config.model import SwinConfig, ViTConfig
from mimray.trainers.config.run import Recipe, parse_recipe
from mimray.trainers.config.simmim import SimMIMConfig
from mimray.trainers.convert.folder import as_json, model_card, write_folder
from mimray.trainers.convert.names import (
    HF_DECODER,
    HF_DINOV2,
    HF_DINOV2_GATED,
    HF_DINOV3,
    HF_DINOV3_GATED,
    HF_SIGLIP,
    HF_SWIN,
    HF_VIT,
    rename,
    shift_downsample,
    split_gates,
    split_qkv,
    to_pixel_shuffle,
    without_key_bias,
)
from mimray.trainers.convert.shapes import beyond_vit
from mimray.trainers.errors import BundleError

_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers, which preprocessor files hold
_SWIN_EPS = 1e-5
_State = dict[str, Tensor]


class _Model(NamedTuple):
    """A model of transformers: its class, its parameters, its configuration."""

    name: str
    state: dict[str, Tensor]
    config: dict[str, Any]


def export_transformers(bundle: Path, out: Path) -> str:
    """Write a folder that `from_pretrained(OUT)` of a class of transformers loads.

    mae with its decoder of self-attention becomes ViTMAEForPreTraining; beit
    BeitForMaskedImageModeling; simmim SwinForMaskedImageModeling or, with absolute positions alone,
    ViTForMaskedImageModeling.
    Everything else, and what these cannot hold, becomes its encoder alone: ViTModel, BeitModel,
    SwinModel, Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel or SiglipVisionModel.

    Args:
        bundle: a bundle's folder, or a run's that holds one.
        out: the folder to write; new or empty.

    Returns:
        The name of the class.

    Raises:
        BundleError: no sound bundle there, one that no class can hold, or `out` holds files.
        StorageError: `out` cannot be written.
    """
    frozen = load_bundle(bundle)
    card, folder = frozen.card, bundle_folder(bundle)
    recipe, rest = _method(folder, card)
    state, shape = frozen.encoder.state_dict(), card.encoder
    if card.method == "mae" and not _crosses(recipe):
        model = _vit_mae(card, state, recipe, rest, folder)
    elif isinstance(shape, SwinConfig):
        model = _swin(card, shape, state, recipe, rest)
    elif isinstance(shape, ViTConfig) and beyond_vit(shape):
        model = _newer(card, shape, state)
    elif isinstance(shape, ViTConfig) and _is_plain(shape):
        model = _vit(card, shape, state, recipe, rest)
    elif isinstance(shape, ViTConfig):
        model = _beit(card, shape, state, recipe, rest)
    else:
        raise BundleError(
            f"transformers has no encoder {shape.name}; it holds vit and swin",
            hint="export the bundle",
        )
    config = {"architectures": [model.name], "dtype": "float32"} | model.config
    alone = model.name.endswith("Model")
    holds = "the encoder alone, without head" if alone else f"encoder and head ({model.name})"
    files = {
        "config.json": as_json(config),
        "preprocessor_config.json": as_json(_preprocessor(card)),
        "README.md": model_card(card, "transformers", holds, _usage(model.name)),
    }
    write_folder(out, model.state, files)
    return model.name


def _method(folder: Path, card: BundleCard) -> tuple[Recipe | None, _State]:
    """The recipe and the method's weights beside the encoder; nothing of an encoder alone."""
    if not (folder / METHOD).is_file() or not card.recipe:
        return None, {}
    verify_weights(folder, card, METHOD)
    return parse_recipe(card.recipe, f"{folder}/bundle.json"), load_file(folder / METHOD)


def _vit_mae(
    card: BundleCard, state: _State, recipe: Recipe | None, rest: _State, folder: Path
) -> _Model:
    _check_square(card, "ViTMAE")
    if recipe is None:
        raise BundleError(
            f"{folder} holds the encoder alone; transformers' ViTMAE needs the decoder",
            hint="use the run's own folder, or export for timm",
        )
    shape, method = recipe.encoder, recipe.method
    assert isinstance(shape, ViTConfig)
    assert isinstance(method, MAEConfig)
    beyond = beyond_vit(shape) + ["scaled layers"] * (shape.layer_scale is not None)
    if beyond:
        raise BundleError(
            f"{folder} has {' and '.join(beyond)}, which transformers' ViTMAE has not",
            hint="export for timm",
        )
    config = _vit_config(card, shape, "vit_mae") | {
        "decoder_num_attention_heads": method.decoder_num_heads,
        "decoder_hidden_size": method.decoder_width,
        "decoder_num_hidden_layers": method.decoder_depth,
        "decoder_intermediate_size": rest["decoder.blocks.0.mlp.fc1.bias"].numel(),
        "mask_ratio": method.mask_ratio,
        "norm_pix_loss": method.norm_pix_loss,
    }
    encoder = rename(split_qkv(state), HF_VIT)
    decoder = rename(split_qkv(rest), HF_DECODER)
    return _Model("ViTMAEForPreTraining", _within("vit", encoder) | decoder, config)


def _vit(
    card: BundleCard, shape: ViTConfig, state: _State, recipe: Recipe | None, rest: _State
) -> _Model:
    encoder = rename(split_qkv(state), HF_VIT)
    config = _vit_config(card, shape, "vit") | {"encoder_stride": shape.patch_size}
    # Its head puts together squares only.
    if not _is_simmim(recipe) or not _is_square(card):
        return _Model("ViTModel", encoder, config)
    head = _pixel_head("vit", rest, card.channels)
    return _Model("ViTForMaskedImageModeling", _within("vit", encoder) | head, config)


def _beit(
    card: BundleCard, shape: ViTConfig, state: _State, recipe: Recipe | None, rest: _State
) -> _Model:
    _check_square(card, "Beit")
    encoder = rename(without_key_bias(split_qkv(state)), HF_VIT)
    whole = recipe is not None and isinstance(recipe.method, BEiTConfig)
    config = _vit_config(card, shape, "beit") | {
        "use_mask_token": whole,
        "use_absolute_position_embeddings": shape.positions != "none",
        "use_relative_position_bias": shape.rel_pos_bias == "per_block",
        "use_shared_relative_position_bias": shape.rel_pos_bias == "shared",
        "layer_scale_init_value": shape.layer_scale or 0.0,
        # Else the norm of tokens would be one of their mean; the head has a norm of its own.
        "use_mean_pooling": whole,
    }
    if not whole:
        return _Model("BeitModel", encoder, config)
    norm = {k: encoder.pop(k) for k in ("layernorm.weight", "layernorm.bias")}
    head = {
        "beit.embeddings.mask_token": rest["mask_token"],
        "lm_head.weight": rest["head.weight"],
        "lm_head.bias": rest["head.bias"],
    }
    config["vocab_size"] = rest["head.bias"].numel()
    state = _within("beit", encoder) | norm | head
    return _Model("BeitForMaskedImageModeling", state, config)


def _newer(card: BundleCard, shape: ViTConfig, state: _State) -> _Model:
    """One of the classes for encoders with registers, RoPE, a gated MLP or no class token."""
    inner = shape.qk_norm or shape.attn_norm or shape.mlp_norm or shape.norm != "layer"
    placed = shape.positions != "none" and shape.rope == "none" and shape.rel_pos_bias == "none"
    if shape.rope == "dinov3" and shape.positions == "none" and shape.class_token and not inner:
        return _dinov3(card, shape, state)
    if placed and shape.class_token and not inner and shape.mlp != "gelu_tanh":
        return _dinov2(card, shape, state)
    bare = not shape.class_token and not shape.num_registers and shape.layer_scale is None
    if placed and bare and not inner and shape.mlp != "swiglu":
        return _siglip(card, shape, state)
    raise BundleError(
        f"{card.name} has {' and '.join(beyond_vit(shape))}, which no class of transformers holds "
        "together",
        hint="export for timm",
    )


def _scaled(shape: ViTConfig, state: _State) -> _State:
    """A state with scales of its layers, which some classes always have."""
    if shape.layer_scale is not None:
        return state
    ones = {f"blocks.{i}.ls{j}.gamma": torch.ones(shape.width) for i in range(shape.depth)
            for j in (1, 2)}  # fmt: skip
    return state | ones


def _dinov2(card: BundleCard, shape: ViTConfig, state: _State) -> _Model:
    _check_square(card, "DINOv2")
    gated, hidden = shape.mlp == "swiglu", int(shape.width * shape.mlp_ratio)
    ratios = [r for r in range(1, 17) if hidden == _dinov2_hidden(shape.width, r, gated)]
    if not ratios:
        raise BundleError(
            f"{card.name} has an MLP of {hidden} channels, which transformers' DINOv2 with its "
            "whole ratios of the width has not",
            hint="export for timm",
        )
    state = _scaled(shape, state) | {"mask_token": torch.zeros(1, shape.width)}
    names = (HF_DINOV2_GATED if gated else HF_DINOV2) | {"mask_token": "embeddings.mask_token"}
    kind = "dinov2_with_registers" if shape.num_registers else "dinov2"
    config = _vit_config(card, shape, kind) | {
        "mlp_ratio": ratios[0],
        "use_swiglu_ffn": gated,
        "layerscale_value": shape.layer_scale or 1.0,
    }
    del config["intermediate_size"]
    if not shape.num_registers:
        return _Model("Dinov2Model", rename(split_qkv(state), names), config)
    config["num_register_tokens"] = shape.num_registers
    return _Model("Dinov2WithRegistersModel", rename(split_qkv(state), names), config)


def _dinov2_hidden(width: int, ratio: int, gated: bool) -> int:
    """Hidden width of transformers' DINOv2; of a gated MLP two thirds, to whole eights."""
    hidden = width * ratio
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden


def _dinov3(card: BundleCard, shape: ViTConfig, state: _State) -> _Model:
    gated = shape.mlp == "swiglu"
    split = split_qkv(_scaled(shape, state))
    if not shape.key_bias:
        split = without_key_bias(split)
    names = HF_DINOV3
    if gated:
        split, names = split_gates(split), HF_DINOV3_GATED
    empty = {"embeddings.mask_token": torch.zeros(1, 1, shape.width)}
    if not shape.num_registers:
        empty["embeddings.register_tokens"] = torch.zeros(1, 0, shape.width)
    activations = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "swiglu": "silu"}
    config = _vit_config(card, shape, "dinov3_vit") | {
        "hidden_act": activations[shape.mlp],
        "use_gated_mlp": gated,
        "key_bias": shape.key_bias,
        "num_register_tokens": shape.num_registers,
        "layerscale_value": shape.layer_scale or 1.0,
        "rope_theta": shape.rope_temperature or 100.0,
    }
    return _Model("DINOv3ViTModel", rename(split, names) | empty, config)


def _siglip(card: BundleCard, shape: ViTConfig, state: _State) -> _Model:
    _check_square(card, "SigLIP")
    config = _vit_config(card, shape, "siglip_vision_model") | {
        "hidden_act": "gelu" if shape.mlp == "gelu" else "gelu_pytorch_tanh",
        "vision_use_head": False,
    }
    state = state | {"pos_embed": state["pos_embed"][0]}
    return _Model("SiglipVisionModel", rename(split_qkv(state), HF_SIGLIP), config)


def _swin(
    card: BundleCard, shape: SwinConfig, state: _State, recipe: Recipe | None, rest: _State
) -> _Model:
    # Where one side of a grid is no longer than a window, its Swin shifts along neither.
    _check_square(card, "Swin")
    encoder = rename(split_qkv(shift_downsample(state, by=-1)), HF_SWIN)
    config = _common_config(card, "swin") | {
        "embed_dim": shape.width,
        "depths": list(shape.depths),
        "num_heads": list(shape.num_heads),
        "window_size": shape.window_size,
        "mlp_ratio": shape.mlp_ratio,
        "patch_size": shape.patch_size,
        "layer_norm_eps": _SWIN_EPS,
        "use_absolute_embeddings": False,
        "encoder_stride": shape.stride,
    }
    if not _is_simmim(recipe):
        return _Model("SwinModel", encoder, config)
    head = _pixel_head("swin", rest, card.channels)
    return _Model("SwinForMaskedImageModeling", _within("swin", encoder) | head, config)


def _is_plain(shape: ViTConfig) -> bool:
    """True if transformers' ViT can hold it; its Beit can hold the rest."""
    return shape.positions != "none" and shape.rel_pos_bias == "none" and shape.layer_scale is None


def _crosses(recipe: Recipe | None) -> bool:
    """True of a decoder that transformers does not have."""
    method = None if recipe is None else recipe.method
    return isinstance(method, MAEConfig) and method.decoder == "cross"


def _is_simmim(recipe: Recipe | None) -> bool:
    return recipe is not None and isinstance(recipe.method, SimMIMConfig)


def _is_square(card: BundleCard) -> bool:
    return card.image_size[0] == card.image_size[1]


def _check_square(card: BundleCard, theirs: str) -> None:
    if not _is_square(card):
        height, width = card.image_size
        raise BundleError(
            f"{card.name} takes pictures of {height}x{width}; transformers' {theirs} takes "
            "squares only",
            hint="export for timm",
        )


def _within(name: str, state: _State) -> _State:
    return {f"{name}.{key}": value for key, value in state.items()}


def _pixel_head(inside: str, rest: _State, channels: int) -> _State:
    weight, bias = (to_pixel_shuffle(rest[f"head.{kind}"], channels) for kind in ("weight", "bias"))
    return {
        f"{inside}.embeddings.mask_token": rest["mask_token"],
        "decoder.0.weight": weight[:, :, None, None],  # a 1x1 convolution
        "decoder.0.bias": bias,
    }


def _vit_config(card: BundleCard, shape: ViTConfig, model_type: str) -> dict[str, Any]:
    return _common_config(card, model_type) | {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.num_heads,
        "intermediate_size": int(shape.width * shape.mlp_ratio),
        "patch_size": shape.patch_size,
        "layer_norm_eps": shape.norm_eps,
    }


def _common_config(card: BundleCard, model_type: str) -> dict[str, Any]:
    height, width = card.image_size
    return {
        "model_type": model_type,
        "image_size": height if height == width else [height, width],
        "num_channels": card.channels,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "qkv_bias": True,
    }


def _preprocessor(card: BundleCard) -> dict[str, Any]:
    height, width = card.image_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": _RESAMPLE[card.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(card.mean),
        "image_std": list(card.std),
    }


def _usage(name: str) -> str:
    options = ", add_pooling_layer=False" if name == "ViTModel" else ""
    inputs, result = {
        "ViTMAEForPreTraining": ("", "loss, logits, mask"),
        "BeitForMaskedImageModeling": (", bool_masked_pos=mask", "logits"),
        "ViTForMaskedImageModeling": (", bool_masked_pos=mask", "loss, reconstruction"),
        "SwinForMaskedImageModeling": (", bool_masked_pos=mask", "loss, reconstruction"),
    }.get(name, ("", "last_hidden_state"))
    return (
        f"from transformers import AutoImageProcessor, {name}\n\n"
        'processor = AutoImageProcessor.from_pretrained("PATH/TO/THIS/FOLDER")\n'
        f'model = {name}.from_pretrained("PATH/TO/THIS/FOLDER"{options}).eval()\n'
        f'output = model(**processor(images, return_tensors="pt"){inputs})  # {result}'
    )
