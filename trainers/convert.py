"""A bundle in the layouts of other libraries: timm's, and Hugging Face transformers'.

Only files are written; neither library is imported, so any version of theirs may read them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from trainers.bundles import METHOD, BundleCard, bundle_folder, load_bundle, load_state
from trainers.config.method import MAEConfig
from trainers.config.model import ViTConfig
from trainers.config.run import Recipe, parse_recipe
from trainers.errors import BundleError
from trainers.models.decoders import MAEDecoder
from trainers.models.vit import LAYER_NORM_EPS
from trainers.storage import storage_errors

_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers, which preprocessor files hold

# Names inside a transformer block, timm's to those of published ViTMAE checkpoints, which every
# version of transformers reads.
_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_ENCODER = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj.weight": "vit.embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "vit.embeddings.patch_embeddings.projection.bias",
    "norm.weight": "vit.layernorm.weight",
    "norm.bias": "vit.layernorm.bias",
}
_DECODER = {
    "embed.weight": "decoder.decoder_embed.weight",
    "embed.bias": "decoder.decoder_embed.bias",
    "mask_token": "decoder.mask_token",
    "pos_embed": "decoder.decoder_pos_embed",
    "norm.weight": "decoder.decoder_norm.weight",
    "norm.bias": "decoder.decoder_norm.bias",
    "pred.weight": "decoder.decoder_pred.weight",
    "pred.bias": "decoder.decoder_pred.bias",
}


def export_timm(bundle: Path, out: Path) -> None:
    """Write a folder that `timm.create_model("local-dir:OUT", pretrained=True)` loads.

    The model has no classifier; calling it gives the card's pooling of the normalised tokens,
    `forward_features` the tokens themselves, class token first.

    Args:
        bundle: a bundle's folder, or a run's that holds one.
        out: the folder to write; new or empty.

    Raises:
        BundleError: no sound bundle there, or `out` holds files.
        StorageError: `out` cannot be written.
    """
    frozen = load_bundle(bundle)
    card = frozen.card
    shape, pool = card.encoder, "avg" if card.pooling == "mean" else "token"
    assert isinstance(shape, ViTConfig)
    config = {
        # Any classic ViT entry point does: model_args replaces every number of its shape.
        "architecture": "vit_base_patch16_224",
        "num_classes": 0,
        "num_features": shape.width,
        "global_pool": pool,
        "model_args": {
            "img_size": list(card.image_size),
            "patch_size": shape.patch_size,
            "in_chans": card.channels,
            "embed_dim": shape.width,
            "depth": shape.depth,
            "num_heads": shape.num_heads,
            "mlp_ratio": shape.mlp_ratio,
            "num_classes": 0,
            "global_pool": pool,
            # The final norm comes before the pooling, as it did here.
            "fc_norm": False,
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
    usage = (
        "import timm\n\n"
        'model = timm.create_model("local-dir:PATH/TO/THIS/FOLDER", pretrained=True).eval()\n'
        "tokens = model.forward_features(images)  # [B, 1 + N, D], class token first\n"
        "pooled = model(images)  # [B, D]"
    )
    files = {"config.json": _json(config), "README.md": _readme(card, "timm", usage)}
    _write_folder(out, frozen.encoder.state_dict(), files)


def export_transformers(bundle: Path, out: Path) -> None:
    """Write a folder that `ViTMAEForPreTraining.from_pretrained(OUT)` loads, decoder included.

    Args:
        bundle: a bundle's folder that kept its decoder, or a run's that holds one.
        out: the folder to write; new or empty.

    Raises:
        BundleError: no sound bundle there, one that ViTMAE cannot hold, or `out` holds files.
        StorageError: `out` cannot be written.
    """
    frozen = load_bundle(bundle)
    card, folder = frozen.card, bundle_folder(bundle)
    recipe = _vitmae_recipe(folder, card)
    method, shape = recipe.method, card.encoder
    assert isinstance(method, MAEConfig)
    assert isinstance(shape, ViTConfig)
    decoder = MAEDecoder(
        encoder_width=shape.width,
        width=method.decoder_width,
        depth=method.decoder_depth,
        num_heads=method.decoder_num_heads,
        grid=recipe.grid,
        out_dim=shape.patch_size**2 * card.channels,
    )
    load_state(nn.ModuleDict({"decoder": decoder}), folder / METHOD)
    state = dict(_renamed(frozen.encoder.state_dict(), _ENCODER, "vit.encoder.layer"))
    state |= _renamed(decoder.state_dict(), _DECODER, "decoder.decoder_layers")

    config = {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "dtype": "float32",
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.num_heads,
        "intermediate_size": int(shape.width * shape.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": LAYER_NORM_EPS,
        "image_size": card.image_size[0],
        "patch_size": shape.patch_size,
        "num_channels": card.channels,
        "qkv_bias": True,
        "decoder_num_attention_heads": method.decoder_num_heads,
        "decoder_hidden_size": method.decoder_width,
        "decoder_num_hidden_layers": method.decoder_depth,
        "decoder_intermediate_size": state[
            "decoder.decoder_layers.0.intermediate.dense.bias"
        ].numel(),
        "mask_ratio": method.mask_ratio,
        "norm_pix_loss": method.norm_pix_loss,
    }
    height, width = card.image_size
    preprocessor = {
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
    usage = (
        "from transformers import AutoImageProcessor, ViTMAEForPreTraining\n\n"
        'processor = AutoImageProcessor.from_pretrained("PATH/TO/THIS/FOLDER")\n'
        'model = ViTMAEForPreTraining.from_pretrained("PATH/TO/THIS/FOLDER").eval()\n'
        'output = model(**processor(images, return_tensors="pt"))  # loss, logits, mask'
    )
    files = {
        "config.json": _json(config),
        "preprocessor_config.json": _json(preprocessor),
        "README.md": _readme(card, "transformers", usage),
    }
    _write_folder(out, state, files)


def _vitmae_recipe(folder: Path, card: BundleCard) -> Recipe:
    """The recipe of a bundle that ViTMAE can hold; refuses any other."""
    height, width = card.image_size
    if card.method != "mae":
        raise BundleError(
            f"{folder} was trained by method {card.method or 'unknown'!r}; "
            "transformers' ViTMAE holds mae only",
            hint="export for timm, which takes any ViT encoder",
        )
    if height != width:
        raise BundleError(
            f"{folder} takes pictures of {height}x{width}; transformers' ViTMAE takes squares only",
            hint="export for timm, which takes any ViT encoder",
        )
    if not (folder / METHOD).is_file() or not card.recipe:
        raise BundleError(
            f"{folder} holds the encoder alone; transformers' ViTMAE needs the decoder",
            hint="use the run's own folder, or export for timm",
        )
    return parse_recipe(card.recipe, f"{folder}/bundle.json")


def _renamed(
    state: dict[str, Tensor], names: dict[str, str], layers: str
) -> Iterator[tuple[str, Tensor]]:
    """A state under ViTMAE's names; the joint qkv projection becomes three."""
    for key, value in state.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", key)
        if block is None:
            yield names[key], value
            continue
        index, part, kind = block.groups()
        if part == "attn.qkv":
            for name, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                yield f"{layers}.{index}.attention.attention.{name}.{kind}", third
        else:
            yield f"{layers}.{index}.{_BLOCK[part]}.{kind}", value


def _write_folder(out: Path, state: dict[str, Tensor], files: dict[str, str]) -> None:
    """Write a folder that is whole or not there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BundleError(f"{out} exists and is not empty", hint="remove it or name another folder")
    with storage_errors(str(out)):
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            weights = {key: value.contiguous() for key, value in state.items()}
            # Not save_file: it hides from us why a disk refuses.
            (aside / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
            for name, text in files.items():
                (aside / name).write_text(text, encoding="utf-8")
            aside.chmod(0o755)
            os.replace(aside, out)  # takes the place of an empty folder too
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _readme(card: BundleCard, library: str, usage: str) -> str:
    height, width = card.image_size
    facts = {
        "Encoder": f"{card.encoder.name}, stride {card.encoder.stride} px, "
        f"{card.encoder.num_layers} layers, width {card.encoder.out_width}",
        "Input": f"{card.channels} x {height} x {width}, resized whole ({card.interpolation}), "
        f"mean {list(card.mean)}, std {list(card.std)}",
        "Pre-training": f"{card.method or 'unknown'}, {card.step} updates, {card.samples} pictures",
        "Plan": card.plan_hash,
        "Data fingerprint": card.data_fingerprint,
        "Made by": f"`{card.created_by}`" if card.created_by else "",
    }
    lines = [f"- {name}: {value}" for name, value in facts.items() if value]
    front = f"---\nlibrary_name: {library}\npipeline_tag: image-feature-extraction\n---\n\n"
    recipe = f"## Recipe\n\n```json\n{_json(card.recipe)}```\n" if card.recipe else ""
    return (
        f"{front}# {card.name}\n\nPre-trained without labels by mimray.\n\n"
        + "\n".join(lines)
        + f"\n\n## Use\n\n```python\n{usage}\n```\n\n{recipe}"
    )


def _json(tree: dict[str, Any]) -> str:
    return json.dumps(tree, indent=2, allow_nan=False) + "\n"
