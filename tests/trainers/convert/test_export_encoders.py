"""Exports of encoders with registers, RoPE, a gated MLP or no class token; or a clear refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from mimray.trainers import load_bundle
from mimray.trainers.bundles import BundleCard, save_bundle
from mimray.trainers.config.model import ViTConfig
from mimray.trainers.convert import export_timm, export_transformers, import_weights
from mimray.trainers.errors import BundleError
from mimray.trainers.models import build_encoder

LEARNED: dict[str, Any] = {
    "name": "vit", "width": 48, "depth": 2, "num_heads": 4, "patch_size": 8, "positions": "learned",
}  # fmt: skip
ROPE = LEARNED | {"positions": "none", "num_registers": 4, "layer_scale": 0.1, "key_bias": False}
DINOV3 = ROPE | {"rope": "dinov3", "norm_eps": 1e-5}
EVA02 = LEARNED | {
    "rope": "eva02", "rope_grid": [3, 5], "mlp": "swiglu", "mlp_ratio": 8 / 3, "key_bias": False,
}  # fmt: skip
SIGLIP = LEARNED | {"class_token": False, "mlp": "gelu_tanh"}
REGISTERS = LEARNED | {"num_registers": 4, "layer_scale": 0.1}
NORMS = {"qk_norm": True, "attn_norm": True, "mlp_norm": True}
GATED = {"mlp": "swiglu", "mlp_ratio": 128 / 48}


def bundle_of(zoo: Any, encoder: dict[str, Any], folder: Path, size: tuple[int, int]) -> Path:
    config = ViTConfig.model_validate(encoder)
    made = zoo.trained_like(build_encoder(config, size, 3))
    card = BundleCard(
        name="mine", encoder=config, image_size=size, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3,
        layers=(1,),
    )  # fmt: skip
    state = made.state_dict()
    if not config.key_bias:  # held at zero from the start
        for key in [k for k in state if k.endswith("attn.qkv.bias")]:
            state[key][config.width : 2 * config.width] = 0
    save_bundle(folder, card, state)
    return folder


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize(
    "encoder",
    [
        REGISTERS,
        REGISTERS | GATED,
        LEARNED | NORMS | {"norm": "rms"},
        SIGLIP,
        SIGLIP | {"num_registers": 2, "mlp": "swiglu"} | NORMS,
        DINOV3,
        DINOV3 | GATED | {"class_token": False},
        EVA02,
        EVA02 | NORMS,
    ],
    ids=str,
)
def test_timm__features_are_the_same_there_and_back(
    tmp_path: Path, zoo: Any, encoder: dict[str, Any], size: tuple[int, int]
):
    bundle = bundle_of(zoo, encoder, tmp_path / "bundle", size)
    export_timm(bundle, tmp_path / "out")

    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()

    images = zoo.images(size)
    ours = load_bundle(bundle)(images)
    tokens = torch.cat([ours.prefix, ours.tokens], dim=1)
    torch.testing.assert_close(theirs.forward_features(images), tokens, rtol=0, atol=1e-4)
    torch.testing.assert_close(theirs(images), ours.pooled, rtol=0, atol=1e-4)
    import_weights(str(tmp_path / "out"), tmp_path / "back")
    again = load_bundle(tmp_path / "back")
    torch.testing.assert_close(again(images).tokens, ours.tokens, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("encoder", "name"),
    [
        (REGISTERS, "Dinov2WithRegistersModel"),
        (REGISTERS | GATED, "Dinov2WithRegistersModel"),
        (LEARNED | GATED, "Dinov2Model"),
        (DINOV3, "DINOv3ViTModel"),
        (DINOV3 | GATED | {"num_registers": 0, "key_bias": True}, "DINOv3ViTModel"),
        (SIGLIP, "SiglipVisionModel"),
        (SIGLIP | {"mlp": "gelu"}, "SiglipVisionModel"),
    ],
    ids=str,
)
def test_transformers__features_are_the_same_there_and_back(
    tmp_path: Path, zoo: Any, encoder: dict[str, Any], name: str
):
    import transformers

    bundle = bundle_of(zoo, encoder, tmp_path / "bundle", (32, 32))
    assert export_transformers(bundle, tmp_path / "out") == name

    theirs, info = getattr(transformers, name).from_pretrained(
        tmp_path / "out", output_loading_info=True
    )

    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    images = zoo.images(32)
    ours = load_bundle(bundle)(images)
    tokens = torch.cat([ours.prefix, ours.tokens], dim=1)
    found = theirs.eval()(images).last_hidden_state
    torch.testing.assert_close(found, tokens, rtol=0, atol=1e-4)
    import_weights(str(tmp_path / "out"), tmp_path / "back")
    again = load_bundle(tmp_path / "back")
    torch.testing.assert_close(again(images).tokens, ours.tokens, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (EVA02, r"rotary positions \(eva02\) and an MLP of swiglu, which no class"),
        (REGISTERS | NORMS, "norms inside attention and a norm inside the MLP, which no class"),
        (LEARNED | {"mlp": "swiglu", "mlp_ratio": 1.1}, "an MLP of 52 channels"),
    ],
)
def test_transformers__refuses_what_no_class_holds(
    tmp_path: Path, zoo: Any, encoder: dict[str, Any], message: str
):
    bundle = bundle_of(zoo, encoder, tmp_path / "bundle", (32, 32))
    with pytest.raises(BundleError, match=message):
        export_transformers(bundle, tmp_path / "out")


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (DINOV3 | {"key_bias": True}, "its keys have a bias"),
        (DINOV3 | {"norm_eps": 1e-4}, "epsilon 0.0001, timm's Eva"),
        (DINOV3 | {"mlp": "gelu_tanh"}, "its MLP is gelu_tanh"),
        (
            LEARNED | {"rel_pos_bias": "shared", "mlp": "swiglu"},
            "an MLP of swiglu beside relative positions",
        ),
    ],
)
def test_timm__refuses_what_it_cannot_hold(
    tmp_path: Path, zoo: Any, encoder: dict[str, Any], message: str
):
    bundle = bundle_of(zoo, encoder, tmp_path / "bundle", (32, 32))
    with pytest.raises(BundleError, match=message):
        export_timm(bundle, tmp_path / "out")
