"""Models of timm, imported."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

from mimray.trainers import load_bundle
from mimray.trainers.convert import import_weights
from mimray.trainers.errors import BundleError

IMAGENET, HALF = (0.485, 0.456, 0.406), (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("vit", {}),
        ("vit", {"init_values": 0.1, "img_size": (24, 48)}),
        ("vit", {"no_embed_class": True, "qkv_bias": False, "global_pool": "avg"}),
        ("vit", {"in_chans": 1}),
        ("beit", {"use_shared_rel_pos_bias": True, "use_abs_pos_emb": False}),
        ("beit", {"use_rel_pos_bias": True, "use_abs_pos_emb": True, "img_size": (24, 40)}),
        ("swin", {}),
        ("swin", {"img_size": (32, 64), "num_classes": 0}),
    ],
)
def test_timm__folder_gives_its_features(
    tmp_path: Path, zoo: Any, kind: str, options: dict[str, Any]
):
    theirs = zoo.timm(kind, **options)
    save_for_hf(theirs, str(tmp_path / "timm"), safe_serialization=True)

    card = import_weights(str(tmp_path / "timm"), tmp_path / "b").card

    images = zoo.images(theirs.patch_embed.img_size, 2, theirs.in_chans)
    encoder = load_bundle(tmp_path / "b")
    if kind == "swin":
        zoo.close(encoder(images).tokens, theirs.forward_features(images).flatten(1, 2))
    else:
        wanted = theirs.forward_intermediates(images, norm=False)[1]
        for ours, map_ in zip(encoder.features(images, (0, 1), norm=False), wanted, strict=True):
            zoo.close(ours, map_)
    if kind == "vit" and "global_pool" not in options:
        ours = encoder(images)
        tokens = torch.cat([ours.prefix, ours.tokens], dim=1)
        zoo.close(tokens, theirs.forward_features(images))
        zoo.close(ours.pooled, theirs.forward_head(tokens, pre_logits=True))  # its class token
    assert card.image_size == tuple(theirs.patch_embed.img_size)
    assert card.mean == (IMAGENET if kind == "swin" else HALF)[: card.channels]


@pytest.mark.parametrize("file", ["weights.safetensors", "weights.pth"])
def test_timm__bare_file_with_its_name(tmp_path: Path, zoo: Any, file: str):
    name = "vit_tiny_patch16_224.augreg_in21k"
    theirs = timm.create_model(name, num_classes=0).eval()
    state = theirs.state_dict()
    if file.endswith(".pth"):
        wrapped = {f"module.{k}": v for k, v in state.items()}
        torch.save({"state_dict": wrapped, "args": argparse.Namespace(lr=1)}, tmp_path / file)
    else:
        save_file(state, tmp_path / file)

    card = import_weights(str(tmp_path / file), tmp_path / "b", architecture=name).card

    assert (card.encoder.name, card.mean, card.name) == ("vit_tiny", HALF, "weights")
    images = zoo.images(224, 1)
    zoo.close(load_bundle(tmp_path / "b")(images).pooled, theirs(images))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swinv2_cr_tiny_ns_224", "SwinTransformerV2Cr"),
        ("vit_base_patch16_rpn_224", "ResPostBlock"),
        ("vit_base_patch16_clip_quickgelu_224", "QuickGELU"),
        ("no_such_model", "timm cannot give 'no_such_model'"),
    ],
)
def test_timm__refuses_what_weights_would_not_show(tmp_path: Path, name: str, message: str):
    save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors")

    with pytest.raises(BundleError, match=message):
        import_weights(str(tmp_path / "w.safetensors"), tmp_path / "b", architecture=name)


def test_timm__a_name_without_weights_is_refused(tmp_path: Path):
    with pytest.raises(BundleError, match="timm cannot give 'vit_nowhere'"):
        import_weights("timm:vit_nowhere", tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_timm__by_name_asks_timm_for_the_weights(
    tmp_path: Path, zoo: Any, monkeypatch: pytest.MonkeyPatch
):
    theirs, asked = zoo.timm("vit", num_classes=0), []

    def create_model(name: str, pretrained: bool) -> Any:
        asked.append((name, pretrained))
        return theirs

    monkeypatch.setattr(timm, "create_model", create_model)

    card = import_weights("timm:vit_base_patch16_224.mae", tmp_path / "b").card

    assert asked == [("vit_base_patch16_224.mae", True)]
    assert (card.name, card.source) == ("vit_base_patch16_224.mae", f"timm:{card.name}")
    zoo.close(load_bundle(tmp_path / "b")(zoo.images()).pooled, theirs(zoo.images()))
