"""Folders of Hugging Face transformers, imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mimray.trainers import load_bundle, load_method
from mimray.trainers.convert import import_weights
from mimray.trainers.errors import BundleError

IMAGENET, HALF = (0.485, 0.456, 0.406), (0.5, 0.5, 0.5)


@pytest.mark.parametrize("format", ["safetensors", "bin"])
@pytest.mark.parametrize("kind", ["mae", "beit", "swin", "vit"])
def test_transformers__loss_is_theirs(tmp_path: Path, zoo: Any, kind: str, format: str):
    theirs = zoo.hf(kind)
    theirs.save_pretrained(tmp_path / "hf")
    if format == "bin":
        torch.save(load_file(tmp_path / "hf/model.safetensors"), tmp_path / "hf/pytorch_model.bin")
        (tmp_path / "hf/model.safetensors").unlink()

    imported = import_weights(str(tmp_path / "hf"), tmp_path / "b", command="mimray import hf b")

    zoo.same_loss(tmp_path / "b", kind, theirs)
    assert imported.complete
    assert (imported.left_out, imported.initialised) == ((), ())
    card = imported.card
    assert card.method == {"swin": "simmim", "vit": "simmim"}.get(kind, kind)
    assert card.created_by == "mimray import hf b"
    assert card.mean == (IMAGENET if kind in ("mae", "swin") else HALF)


@pytest.mark.parametrize(
    "options",
    [
        {"use_relative_position_bias": True},
        {"use_absolute_position_embeddings": True, "layer_scale_init_value": 0.0},
    ],
)
def test_transformers__other_beits(tmp_path: Path, zoo: Any, options: dict[str, Any]):
    theirs = zoo.hf("beit", **options)
    theirs.save_pretrained(tmp_path / "hf")

    import_weights(str(tmp_path / "hf"), tmp_path / "b")

    zoo.same_loss(tmp_path / "b", "beit", theirs)


@pytest.mark.parametrize("kind", ["vit", "swin", "beit", "vit_mae"])
def test_transformers__encoders_alone(tmp_path: Path, zoo: Any, kind: str):
    import transformers as hf

    vit = zoo.hf("vit").config.to_dict()
    theirs: Any = {
        "vit": lambda: hf.ViTModel(hf.ViTConfig(**vit)),
        "swin": lambda: hf.SwinModel(zoo.hf("swin").config),
        "beit": lambda: hf.BeitModel(
            zoo.hf("beit", use_relative_position_bias=True, use_mean_pooling=False).config
        ),
        "vit_mae": lambda: hf.ViTMAEModel(zoo.hf("mae", mask_ratio=0.0).config),
    }[kind]()
    zoo.trained_like(theirs).save_pretrained(tmp_path / "hf")
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1], "resample": 2}
    (tmp_path / "hf/preprocessor_config.json").write_text(json.dumps(processor))

    imported = import_weights(str(tmp_path / "hf"), tmp_path / "b", partial=kind == "beit")

    encoder, images = load_bundle(tmp_path / "b"), zoo.images(64 if kind == "swin" else 32)
    ours = encoder(images)
    noise = {"noise": torch.arange(16.0).expand(3, 16)} if kind == "vit_mae" else {}
    zoo.close(torch.cat([ours.prefix, ours.tokens], 1), theirs(images, **noise).last_hidden_state)
    card = imported.card
    assert not imported.complete
    assert (card.method, card.recipe) == ("mae" if kind == "vit_mae" else "", {})
    assert (card.mean, card.std, card.interpolation) == ((0.1, 0.2, 0.3), (1, 1, 1), "bilinear")
    assert card.pooling == ("cls" if kind in ("vit", "beit") else "mean")
    assert card.layers == (0, 1)
    with pytest.raises(BundleError, match="encoder alone"):
        load_method(tmp_path / "b")


def test_transformers__norm_after_pooling_is_told(tmp_path: Path, zoo: Any):
    from transformers import BeitForImageClassification

    config = zoo.hf("beit", use_relative_position_bias=True).config
    config.use_mask_token = False
    theirs = zoo.trained_like(BeitForImageClassification(config))
    theirs.save_pretrained(tmp_path / "hf")

    imported = import_weights(str(tmp_path / "hf"), tmp_path / "b")

    assert set(imported.left_out) == {"classifier.weight", "classifier.bias"}
    assert "averages tokens before its last norm" in imported.notes[0]
    (maps,) = load_bundle(tmp_path / "b").features(zoo.images(), (1,), norm=False)
    tokens = theirs.beit(zoo.images()).last_hidden_state[:, 1:]  # before any norm
    zoo.close(maps.flatten(2).transpose(1, 2), tokens)
