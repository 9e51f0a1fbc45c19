"""Checkpoints of the papers' own code, imported.

There are none here, so they are made: weights of transformers' and timm's models, which equal the
published code, under the names and in the wrapping of that code.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from mimray.trainers import load_bundle, load_method
from mimray.trainers.bundles import read_card
from mimray.trainers.convert import import_weights

IMAGENET, HALF = (0.485, 0.456, 0.406), (0.5, 0.5, 0.5)


def joint(state: dict[str, Tensor], attention: str, kind: str) -> Tensor:
    return torch.cat([state[f"{attention}.{name}.{kind}"] for name in ("query", "key", "value")])


def official_block(state: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    """A block of published transformers names as the official codes call it."""
    names = {
        "layernorm_before": "norm1",
        "attention.output.dense": "attn.proj",
        "layernorm_after": "norm2",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }
    block = {
        f"{ours}.{new}.{kind}": state[f"{theirs}.{old}.{kind}"]
        for old, new in names.items()
        for kind in ("weight", "bias")
    }
    attention = f"{theirs}.attention." + ("self" if "blocks" in theirs else "attention")
    block[f"{ours}.attn.qkv.weight"] = joint(state, attention, "weight")
    if f"{attention}.key.bias" in state:
        block[f"{ours}.attn.qkv.bias"] = joint(state, attention, "bias")
    else:
        block[f"{ours}.attn.q_bias"] = state[f"{attention}.query.bias"]
        block[f"{ours}.attn.v_bias"] = state[f"{attention}.value.bias"]
    return block


def saved_state(model: Any, folder: Path) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    return dict(load_file(folder / "model.safetensors"))


def official_mae(folder: Path, theirs: Any) -> dict[str, Tensor]:
    state = saved_state(theirs, folder)
    patches = "vit.embeddings.patch_embeddings.projection"
    official = {
        "cls_token": state["vit.embeddings.cls_token"],
        "pos_embed": state["vit.embeddings.position_embeddings"],
        "mask_token": state["decoder.mask_token"],
        "decoder_pos_embed": state["decoder.decoder_pos_embed"],
    }
    for kind in ("weight", "bias"):
        official[f"patch_embed.proj.{kind}"] = state[f"{patches}.{kind}"]
        official[f"norm.{kind}"] = state[f"vit.layernorm.{kind}"]
        for part in ("embed", "norm", "pred"):
            official[f"decoder_{part}.{kind}"] = state[f"decoder.decoder_{part}.{kind}"]
    for i in range(2):
        official |= official_block(state, f"vit.encoder.layer.{i}", f"blocks.{i}")
        decoder = f"decoder.decoder_encoder.layer.{i}"
        official |= official_block(state, decoder, f"decoder_blocks.{i}")
    return official


KNOWN = ["encoder.num_heads=4", "encoder.norm_eps=1e-12", "method.decoder_num_heads=2"]


def test_official_mae__loss_is_the_published(tmp_path: Path, zoo: Any):
    theirs = zoo.hf("mae")
    state = official_mae(tmp_path / "hf", theirs)
    arguments = argparse.Namespace(norm_pix_loss=True, model="mae_vit_tiny")
    torch.save({"model": state, "epoch": 7, "args": arguments}, tmp_path / "mae.pth")

    imported = import_weights(
        str(tmp_path / "mae.pth"),
        tmp_path / "b",
        overrides=[*KNOWN, "method.mask_ratio=0.375"],
    )

    zoo.same_loss(tmp_path / "b", "mae", theirs)
    card = imported.card
    assert (card.name, card.image_size, card.mean) == ("mae", (32, 32), IMAGENET)
    assert card.source.startswith("mae.pth sha256:")
    assert len(card.source) == len("mae.pth sha256:") + 64
    assert not imported.notes
    torch.save({"model": state}, tmp_path / "mae.pth")
    unsaid = import_weights(
        str(tmp_path / "mae.pth"), tmp_path / "b", overrides=KNOWN, license="cc-by-nc-4.0"
    )
    assert read_card(tmp_path / "b").license == "cc-by-nc-4.0"
    assert "does not say whether targets were normalised" in unsaid.notes[0]


def test_official_mae__encoder_only_file(tmp_path: Path, zoo: Any):
    theirs = zoo.timm("vit", num_classes=0)
    torch.save({"model": theirs.state_dict()}, tmp_path / "mae.pth")

    imported = import_weights(
        str(tmp_path / "mae.pth"), tmp_path / "b", overrides=["encoder.num_heads=4"]
    )

    assert not imported.complete
    ours = load_bundle(tmp_path / "b")(zoo.images())
    zoo.close(torch.cat([ours.prefix, ours.tokens], 1), theirs.forward_features(zoo.images()))


def official_beit(folder: Path, theirs: Any) -> dict[str, Tensor]:
    state = saved_state(theirs, folder)
    patches = "beit.embeddings.patch_embeddings.projection"
    table = "relative_position_bias.relative_position_bias_table"
    official = {
        "cls_token": state["beit.embeddings.cls_token"],
        "mask_token": state["beit.embeddings.mask_token"],
        "rel_pos_bias.relative_position_bias_table": state[f"beit.encoder.{table}"],
        "rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.long),
    }
    for kind in ("weight", "bias"):
        official[f"patch_embed.proj.{kind}"] = state[f"{patches}.{kind}"]
        official[f"norm.{kind}"] = state[f"layernorm.{kind}"]
        official[f"lm_head.{kind}"] = state[f"lm_head.{kind}"]
    for i in range(2):
        layer = f"beit.encoder.layer.{i}"
        official |= official_block(state, layer, f"blocks.{i}")
        official[f"blocks.{i}.gamma_1"] = state[f"{layer}.lambda_1"]
        official[f"blocks.{i}.gamma_2"] = state[f"{layer}.lambda_2"]
    return official


@pytest.mark.parametrize("key", ["model", "module"])
def test_official_beit__loss_is_the_published(tmp_path: Path, zoo: Any, key: str):
    theirs = zoo.hf("beit")
    torch.save({key: official_beit(tmp_path / "hf", theirs)}, tmp_path / "beit.pth")

    imported = import_weights(
        str(tmp_path / "beit.pth"), tmp_path / "b", overrides=["encoder.norm_eps=1e-12"]
    )

    zoo.same_loss(tmp_path / "b", "beit", theirs)
    card = imported.card
    assert (card.mean, card.method) == (HALF, "beit")
    assert [n.partition(",")[0] for n in imported.notes] == [
        "pictures taken as normalised to [-1",
        "its tokenizer is not in the checkpoint; head and codes fit no other",
    ]
    assert card.encoder.rel_pos_bias == "shared"
    assert card.encoder.num_heads == 4  # the table shows it
    assert card.recipe["method"]["vocab_size"] == 11


def test_official_beit__fine_tuned_with_a_table_a_block(tmp_path: Path, zoo: Any):
    theirs = zoo.timm("beit", use_rel_pos_bias=True, init_values=0.1)
    state = theirs.state_dict()
    state["blocks.0.attn.relative_position_index"] = torch.zeros(17, 17, dtype=torch.long)
    torch.save({"model": state}, tmp_path / "ft.pth")

    imported = import_weights(str(tmp_path / "ft.pth"), tmp_path / "b")

    assert set(imported.left_out) == {"head.weight", "head.bias"}
    assert imported.card.mean == HALF
    (maps,) = load_bundle(tmp_path / "b").features(zoo.images(), (1,), norm=False)
    zoo.close(maps, theirs.forward_intermediates(zoo.images(), indices=[1], norm=False)[1][0])


class CfgNode(dict):  # type: ignore[type-arg]
    """As yacs's, which official SimMIM files carry and nobody here has installed."""

    __module__ = "yacs.config"


@pytest.fixture
def yacs(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes the class importable for writing a file; the answer takes it away again."""
    config = types.ModuleType("yacs.config")
    config.CfgNode = CfgNode  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", config)
    return lambda: monkeypatch.undo()


def official_swin(folder: Path, theirs: Any) -> dict[str, Tensor]:
    state = saved_state(theirs, folder)
    official = {
        "encoder.mask_token": state["swin.embeddings.mask_token"],
        # 32 x 32 tokens in windows of 4: 64 of 16 tokens.
        "encoder.layers.0.blocks.1.attn_mask": torch.zeros(64, 16, 16),
    }
    for kind in ("weight", "bias"):
        patches = "swin.embeddings.patch_embeddings.projection"
        official[f"encoder.patch_embed.proj.{kind}"] = state[f"{patches}.{kind}"]
        official[f"encoder.patch_embed.norm.{kind}"] = state[f"swin.embeddings.norm.{kind}"]
        official[f"encoder.norm.{kind}"] = state[f"swin.layernorm.{kind}"]
        official[f"decoder.0.{kind}"] = state[f"decoder.0.{kind}"]
    for kind in ("norm.weight", "norm.bias", "reduction.weight"):
        downsample = f"layers.0.downsample.{kind}"  # at the end of a stage in both
        official[f"encoder.{downsample}"] = state[f"swin.encoder.{downsample}"]
    for block in ("layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0",
                  "layers.1.blocks.1"):  # fmt: skip
        official |= official_block(state, f"swin.encoder.{block}", f"encoder.{block}")
        attn = f"encoder.{block}.attn"
        table = state[f"swin.encoder.{block}.attention.self.relative_position_bias_table"]
        official[f"{attn}.relative_position_bias_table"] = table
        official[f"{attn}.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    return official


@pytest.mark.parametrize("with_config", [True, False])
def test_official_simmim_swin__loss_is_the_published(
    tmp_path: Path, zoo: Any, yacs: Callable[[], None], with_config: bool
):
    theirs = zoo.hf("swin")
    saved: dict[str, Any] = {"model": official_swin(tmp_path / "hf", theirs)}
    if with_config:
        data = CfgNode(IMG_SIZE=64, MASK_RATIO=0.5, MASK_PATCH_SIZE=8)
        saved["config"] = CfgNode(DATA=data, MODEL=CfgNode(TYPE="swin"))
        saved["config"].frozen = True
    torch.save(saved, tmp_path / "simmim.pth")
    yacs()

    imported = import_weights(str(tmp_path / "simmim.pth"), tmp_path / "b")

    zoo.same_loss(tmp_path / "b", "swin", theirs)
    encoder = imported.card.encoder
    assert (encoder.depths, encoder.num_heads) == ((2, 2), (2, 4))
    assert encoder.window_size == 4
    method = imported.card.recipe["method"]
    wanted = (0.5, 8) if with_config else (0.6, 32)
    assert (method["mask_ratio"], method["mask_unit_px"]) == wanted
    assert imported.card.mean == IMAGENET


def test_official_simmim_vit__features_are_the_beits(tmp_path: Path, zoo: Any):
    # SimMIM's ViT is BEiT's, with a pixel head.
    theirs = zoo.hf("beit")
    beit = official_beit(tmp_path / "hf", theirs)
    state = {f"encoder.{k}": v for k, v in beit.items() if not k.startswith("lm_head.")}
    head = torch.randn(3 * 64, 32, generator=torch.Generator().manual_seed(1))
    state |= {"decoder.0.weight": head[:, :, None, None], "decoder.0.bias": head[:, 0]}
    torch.save({"model": state}, tmp_path / "simmim.pth")

    imported = import_weights(
        str(tmp_path / "simmim.pth"), tmp_path / "b", overrides=["encoder.norm_eps=1e-12"]
    )

    images, mask = zoo.images(), zoo.mask()
    method = load_method(tmp_path / "b")
    output = method(images, mask)
    tokens = theirs.layernorm(theirs.beit(images, bool_masked_pos=mask).last_hidden_state)
    maps = tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    shuffled = nn.functional.conv2d(maps, head[:, :, None, None], head[:, 0])
    pixels = nn.functional.pixel_shuffle(shuffled, 8)
    torch.testing.assert_close(method.reconstruct(images, output), pixels, rtol=1e-5, atol=1e-4)
    hidden = mask.unflatten(1, (4, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    loss = ((images - pixels).abs() * hidden[:, None]).sum() / hidden.sum() / 3
    assert output.loss.item() == pytest.approx(loss.item(), abs=1e-5)
    assert imported.card.mean == IMAGENET


def test_official_maskfeat__prediction_is_the_published(tmp_path: Path, zoo: Any):
    vit = zoo.timm("vit", num_classes=0)
    generator = torch.Generator().manual_seed(1)
    mask_token = torch.randn(1, 1, 32, generator=generator)
    head = nn.Linear(32, 27)  # one cell of 8 x 8 pixels, 9 bins, 3 channels
    state = vit.state_dict()
    state = {k: v for k, v in state.items() if not k.startswith("norm.")} | {
        "mask_token": mask_token,
        "pred_head.transforms.0.0.weight": state["norm.weight"],
        "pred_head.transforms.0.0.bias": state["norm.bias"],
        "pred_head.projections.0.weight": head.weight.detach(),
        "pred_head.projections.0.bias": head.bias.detach(),
        "hogs.0.weight_x": torch.zeros(3, 1, 3, 3),
        "hogs.0.weight_y": torch.zeros(3, 1, 3, 3),
    }
    config = yaml.safe_dump({"MVIT": {"NUM_HEADS": 4}, "AUG": {"MASK_RATIO": 0.3}})
    torch.save({"model_state": state, "cfg": config, "epoch": 1}, tmp_path / "maskfeat.pyth")

    imported = import_weights(str(tmp_path / "maskfeat.pyth"), tmp_path / "b")

    images, mask = zoo.images(), zoo.mask()
    output = load_method(tmp_path / "b")(images, mask)
    with torch.no_grad():
        x = vit.patch_embed(images)
        x = torch.where(mask.unsqueeze(-1), mask_token, x)
        x = torch.cat([vit.cls_token.expand(3, -1, -1), x], dim=1) + vit.pos_embed
        zoo.close(output.prediction, head(vit.norm(vit.blocks(x))[:, 1:]))
    assert imported.left_out == ()
    assert imported.card.recipe["method"]["mask_ratio"] == 0.3
    assert imported.card.recipe["method"]["hog_cell_px"] == 8
