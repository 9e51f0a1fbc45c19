"""Imported weights at another size of input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.models import save_for_hf

from mimray.trainers import load_bundle, load_method
from mimray.trainers.convert import import_weights
from mimray.trainers.errors import BundleError
from mimray.trainers.models.positions import sincos_2d

# timm stretches relative tables by a hundredth even along a side that keeps its size or shrinks,
# see `resize_table`, and so differs a little.
TABLES = 0.02


@pytest.mark.parametrize(("new", "window"), [((96, 96), 3), ((64, 128), 4), ((224, 224), 7)])
def test_swin__another_size_and_window(tmp_path: Path, zoo: Any, new: tuple[int, int], window: int):
    """Made for 128 pixels and windows of 4; where these do not fit, they go with the picture."""
    shape = {"img_size": 128, "patch_size": 4, "depths": [2, 2, 2, 2], "num_heads": [2] * 4}
    theirs = zoo.timm("swin", num_classes=0, embed_dim=8, **shape)
    save_for_hf(theirs, str(tmp_path / "timm"), safe_serialization=True)

    imported = import_weights(str(tmp_path / "timm"), tmp_path / "b", image_size=new)

    assert imported.card.encoder.window_size == window
    assert imported.card.image_size == new
    theirs.set_input_size(new, window_size=window)
    images = zoo.images(new, 2)
    ours, reference = load_bundle(tmp_path / "b")(images), theirs.forward_features(images)
    torch.testing.assert_close(ours.tokens, reference.flatten(1, 2), rtol=0, atol=TABLES)
    assert imported.notes[0].startswith("positions interpolated from 128x128 to ")


def test_swin__a_size_that_no_window_divides_is_refused(tmp_path: Path, zoo: Any):
    theirs = zoo.timm("swin", num_classes=0)
    save_for_hf(theirs, str(tmp_path / "timm"), safe_serialization=True)

    with pytest.raises(BundleError, match=r"window_size 4 does not divide the 22 tokens"):
        import_weights(str(tmp_path / "timm"), tmp_path / "b", image_size=(44, 88))


@pytest.mark.parametrize("new", [(48, 48), (40, 24), (32, 56)])
@pytest.mark.parametrize("kind", ["vit", "beit"])
def test_vit__another_size_resamples_as_timm(
    tmp_path: Path, zoo: Any, kind: str, new: tuple[int, int]
):
    beit = {"use_rel_pos_bias": True, "use_abs_pos_emb": True, "use_fc_norm": False}
    theirs = zoo.timm(kind, num_classes=0, **beit if kind == "beit" else {})
    save_for_hf(theirs, str(tmp_path / "timm"), safe_serialization=True)

    imported = import_weights(str(tmp_path / "timm"), tmp_path / "b", image_size=new)

    theirs.set_input_size(new)
    zoo.close(load_file(tmp_path / "b/encoder.safetensors")["pos_embed"], theirs.pos_embed)
    images = zoo.images(new)
    ours = load_bundle(tmp_path / "b")(images)
    tokens = torch.cat([ours.prefix, ours.tokens], 1)
    tolerance = 1e-5 if kind == "vit" else TABLES
    torch.testing.assert_close(tokens, theirs.forward_features(images), rtol=0, atol=tolerance)
    assert imported.card.image_size == new
    assert imported.notes == (f"positions interpolated from 32x32 to {new[0]}x{new[1]} pixels",)


def test_vit__relative_tables_keep_what_needs_no_guess(tmp_path: Path, zoo: Any):
    """Constants stay, near offsets stay, the furthest go furthest, the class token's stay."""
    theirs = zoo.timm("beit", use_rel_pos_bias=True)
    state = theirs.state_dict()
    down, across = np.meshgrid(np.arange(-3, 4), np.arange(-3, 4), indexing="ij")
    table = state["blocks.1.attn.relative_position_bias_table"]
    table[:-3, 0] = 5.0
    table[:-3, 1] = torch.from_numpy(2.0 * down + across).flatten()
    torch.save(state, tmp_path / "w.pth")

    key = "blocks.1.rel_pos_bias.relative_position_bias_table"
    resized = {}
    for size in ((24, 16), (48, 40)):
        import_weights(str(tmp_path / "w.pth"), tmp_path / "b", image_size=size)
        resized[size] = load_file(tmp_path / "b/encoder.safetensors")[key]

    smaller, larger = resized[24, 16], resized[48, 40]
    assert (smaller.shape, larger.shape) == ((5 * 3 + 3, 4), (11 * 9 + 3, 4))
    for new in resized.values():
        torch.testing.assert_close(new[:-3, 0], torch.full_like(new[:-3, 0], 5.0))
        assert torch.equal(new[-3:], table[-3:])
    down, across = np.meshgrid(np.arange(-2, 3), np.arange(-1, 2), indexing="ij")
    linear = torch.from_numpy(2.0 * down + across).flatten().float()
    torch.testing.assert_close(smaller[:-3, 1], linear, rtol=0, atol=1e-5)
    square = larger[:-3, 1].unflatten(0, (11, 9))
    assert square[5, 4].item() == pytest.approx(0, abs=1e-5)
    assert square[0, 0].item() == pytest.approx(-9, abs=1e-3)
    assert square[10, 8].item() == pytest.approx(9, abs=1e-3)


def test_mae__another_size_keeps_the_decoder_and_its_fixed_table(tmp_path: Path, zoo: Any):
    theirs = zoo.hf("mae")
    theirs.vit.embeddings.position_embeddings.data[0] = sincos_2d(32, (4, 4), num_prefix=1)
    theirs.save_pretrained(tmp_path / "hf")

    as_is = import_weights(str(tmp_path / "hf"), tmp_path / "a").card
    larger = import_weights(str(tmp_path / "hf"), tmp_path / "b", image_size=(48, 32)).card

    assert as_is.encoder.positions == "sincos"
    assert larger.encoder.positions == "learned"
    assert larger.recipe["data"]["image_size"] == [48, 32]
    method = load_method(tmp_path / "b")
    assert method(zoo.images((48, 32)), zoo.mask(24)).prediction.shape == (3, 24, 192)
    # Resampled, not computed anew: neighbours are as far apart as they were in the picture.
    fresh = sincos_2d(32, (6, 4), num_prefix=1)
    assert (method.state_dict()["encoder.pos_embed"][0] - fresh).abs().max() > 0.1
