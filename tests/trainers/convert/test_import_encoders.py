"""Encoders that people have: DINOv2, registers, DINOv3, EVA-02, SigLIP, in every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor

from mimray.trainers import load_bundle
from mimray.trainers.bundles import FrozenEncoder
from mimray.trainers.convert import import_weights
from mimray.trainers.errors import BundleError, ConfigError
from tests.trainers.convert.small_timm import TIMM, small_timm

SIZES = [(32, 32), (48, 48), (24, 56)]


def whole(encoder: FrozenEncoder, images: Tensor) -> Tensor:
    found = encoder.encoder(images)
    return torch.cat([found.prefix, found.tokens], dim=1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", TIMM)
def test_timm__tokens_and_maps_at_every_size(
    tmp_path: Path, zoo: Any, kind: str, size: tuple[int, int]
):
    """Imported at its own size and at another; timm's own is resized as timm does it."""
    theirs = small_timm(kind, dynamic_img_size=False)
    save_for_hf(theirs, str(tmp_path / "timm"), safe_serialization=True)

    card = import_weights(str(tmp_path / "timm"), tmp_path / "b", image_size=size).card
    import_weights(str(tmp_path / "timm"), tmp_path / "square")

    theirs.set_input_size(size)
    images = zoo.images(size, 2)
    # Before the last norm, which timm's Eva may keep for the pooled tokens.
    wanted, maps = theirs.forward_intermediates(images, indices=[0, 2], norm=False)
    encoder = load_bundle(tmp_path / "b")
    for ours, map_ in zip(encoder.features(images, (0, 2), norm=False), maps, strict=True):
        torch.testing.assert_close(ours, map_, rtol=0, atol=1e-4)
    if isinstance(theirs.norm, torch.nn.LayerNorm):
        torch.testing.assert_close(whole(encoder, images), wanted, rtol=0, atol=1e-4)
    assert card.image_size == size
    # A bundle of one size sees pictures of another.
    resized = whole(load_bundle(tmp_path / "square"), images)
    torch.testing.assert_close(resized, whole(encoder, images), rtol=0, atol=1e-4)


HF_SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 8}
HF: dict[str, tuple[str, dict[str, Any]]] = {
    "dinov2": ("Dinov2", {"image_size": 32}),
    "dinov2 gated": ("Dinov2", {"image_size": 32, "use_swiglu_ffn": True}),
    "registers": ("Dinov2WithRegisters", {"image_size": 32}),
    "registers gated": ("Dinov2WithRegisters", {"image_size": 32, "use_swiglu_ffn": True}),
    "dinov3": ("DINOv3ViT", {"image_size": 32, "intermediate_size": 48, "num_register_tokens": 4}),
    "dinov3 gated": (
        "DINOv3ViT",
        {
            "image_size": 32, "intermediate_size": 48, "num_register_tokens": 2,
            "use_gated_mlp": True, "hidden_act": "silu", "query_bias": False, "value_bias": False,
        },
    ),
    "siglip": ("SiglipVision", {"image_size": 32, "intermediate_size": 48}),
}  # fmt: skip


def hf_model(zoo: Any, kind: str) -> Any:
    import transformers

    name, options = HF[kind]
    config = getattr(transformers, f"{name}Config")(**HF_SHAPE, **options)
    model = getattr(transformers, f"{name}Model")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=zoo.generator(parameter)))
    return model.eval()


@pytest.mark.parametrize("kind", HF)
def test_transformers__folder_gives_its_tokens(tmp_path: Path, zoo: Any, kind: str):
    theirs = hf_model(zoo, kind)
    theirs.save_pretrained(tmp_path / "hf")

    imported = import_weights(str(tmp_path / "hf"), tmp_path / "b")

    encoder = load_bundle(tmp_path / "b")
    # Its DINOv2 without registers resizes positions without antialiasing, unlike timm's.
    for size in SIZES[:1] if kind in ("siglip", "dinov2", "dinov2 gated") else SIZES:
        images = zoo.images(size, 2)
        torch.testing.assert_close(
            whole(encoder, images), theirs(images).last_hidden_state, rtol=0, atol=1e-4
        )
    images = zoo.images(32)
    assert imported.card.pooling == ("mean" if kind == "siglip" else "cls")
    if kind != "siglip":
        zoo.close(encoder(images).pooled, theirs(images).last_hidden_state[:, 0])
    assert imported.card.encoder.num_heads == 4


def test_transformers__two_towers_and_flat_patches(tmp_path: Path, zoo: Any):
    """SigLIP's whole model, and SigLIP 2's patches, which are flat and of any shape of grid."""
    import transformers as hf

    vision = HF_SHAPE | {"intermediate_size": 48}
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 9}
    config = hf.SiglipConfig(vision_config=vision | {"image_size": 32}, text_config=text)
    theirs = zoo.trained_like(hf.SiglipModel(config))
    theirs.save_pretrained(tmp_path / "both")
    import_weights(str(tmp_path / "both"), tmp_path / "b")
    images = zoo.images(32)
    wanted = theirs.vision_model(images).last_hidden_state
    torch.testing.assert_close(
        load_bundle(tmp_path / "b").encoder(images).tokens, wanted, rtol=0, atol=1e-4
    )

    flat = zoo.trained_like(hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**vision, num_patches=16)))
    flat.save_pretrained(tmp_path / "flat")
    import_weights(str(tmp_path / "flat"), tmp_path / "c")
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(3, 16, -1)
    there = torch.ones(3, 16, dtype=torch.long), torch.tensor([[4, 4]] * 3)
    wanted = flat(patches, *there).last_hidden_state
    torch.testing.assert_close(
        load_bundle(tmp_path / "c").encoder(images).tokens, wanted, rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("kind", ["dinov2 registers", "dinov2 gated", "dinov3 qkv bias", "eva02"])
def test_official__names_of_their_own_code(tmp_path: Path, zoo: Any, kind: str):
    """The names and places of the published files, made of timm's model of the same weights."""
    shape = {"embed_dim": 384, "num_heads": 6, "depth": 2}
    theirs = small_timm(kind, **shape, **({"ref_feat_shape": (16, 16)} if kind == "eva02" else {}))
    state = published(dict(theirs.state_dict()), kind)
    torch.save(state, tmp_path / "w.pth")

    imported = import_weights(str(tmp_path / "w.pth"), tmp_path / "b", image_size=(32, 32))

    images = zoo.images(32, 2)
    maps = theirs.forward_intermediates(images, indices=[0, 1], norm=False)[1]
    for ours, map_ in zip(
        load_bundle(tmp_path / "b").features(images, (0, 1), norm=False), maps, strict=True
    ):
        torch.testing.assert_close(ours, map_, rtol=1e-4, atol=1e-3)
    assert imported.card.encoder.num_heads == 6
    licensed = [note for note in imported.notes if "DINOv3 License" in note]
    assert len(licensed) == ("dinov3" in kind)
    assert ("DINOv3 License" in imported.card.license) == ("dinov3" in kind)


def published(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """A state of timm's under the official code's names."""
    renamed = {}
    for key, value in state.items():
        if kind.startswith("dinov3"):
            key = key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
            key = key.replace("reg_token", "storage_tokens")
        elif kind == "eva02":
            key = key.replace("fc_norm", "norm")
        else:
            key = key.replace("reg_token", "register_tokens")
            if "gated" in kind:
                key = key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        renamed[key] = value
    if kind == "eva02":
        for i in range(2):
            mlp = f"blocks.{i}.mlp"
            for part in ("weight", "bias"):
                halves = renamed.pop(f"{mlp}.fc1.{part}").chunk(2)
                renamed[f"{mlp}.w1.{part}"], renamed[f"{mlp}.w2.{part}"] = halves
                renamed[f"{mlp}.w3.{part}"] = renamed.pop(f"{mlp}.fc2.{part}")
            qkv = renamed.pop(f"blocks.{i}.attn.qkv.weight").chunk(3)
            for name, third in zip("qkv", qkv, strict=True):
                renamed[f"blocks.{i}.attn.{name}_proj.weight"] = third
        return renamed | {
            "rope.freqs_cos": torch.ones(16, 64),
            "rope.freqs_sin": torch.ones(16, 64),
            "mask_token": torch.ones(1, 1, 384),
            "lm_head.weight": torch.ones(768, 384),
        }
    if kind.startswith("dinov3"):
        for i in range(2):
            queries = renamed.pop(f"blocks.{i}.attn.q_bias")
            values = renamed.pop(f"blocks.{i}.attn.v_bias")
            # The place of the keys holds numbers that the mask takes out.
            keys = torch.full_like(queries, 7.0)
            renamed[f"blocks.{i}.attn.qkv.bias"] = torch.cat([queries, keys, values])
            mask = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(384)
            renamed[f"blocks.{i}.attn.qkv.bias_mask"] = mask
        return renamed | {"rope_embed.periods": torch.ones(16), "mask_token": torch.ones(1, 384)}
    if "register_tokens" in renamed:
        # There the class token's position is apart.
        place = torch.full((1, 1, 384), 0.25)
        renamed["cls_token"] = renamed["cls_token"] - place
        renamed["pos_embed"] = torch.cat([place, renamed["pos_embed"]], dim=1)
    return renamed | {"mask_token": torch.ones(1, 384)}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_pe_core_tiny_patch16_384", "Eva of EvaBlock with AttentionRope is none"),
        ("eva02_enormous_patch14_clip_224", "Eva of EvaBlockPostNorm"),
    ],
)
def test_timm__refuses_other_evas(tmp_path: Path, name: str, message: str):
    torch.save({"x": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(BundleError, match=message):
        import_weights(str(tmp_path / "w.pth"), tmp_path / "b", architecture=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "dinov3_convnext"}, "'dinov3_convnext' of transformers is not one of"),
        ({"hidden_act": "relu"}, "activation is 'relu'; our encoders have gelu"),
        ({"use_gated_mlp": True}, "activation is 'gelu'; our encoders have silu there"),
        ({"num_attention_heads": 16}, "heads whose width is a multiple of 4, not 2"),
        ({"image_size": 7}, "does not divide data.image_size height 7"),
    ],
)
def test_transformers__refuses_other_dinov3(
    tmp_path: Path, zoo: Any, changes: dict[str, Any], message: str
):
    hf_model(zoo, "dinov3").save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(config | changes))
    with pytest.raises((BundleError, ConfigError), match=message):
        import_weights(str(tmp_path / "hf"), tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("kind", ["dinov3", "eva02", "eva02 mlp norm"])
def test_bare_file__rotary_positions_that_it_does_not_show(tmp_path: Path, kind: str):
    """Without their name such weights would be taken for a vit that cannot tell places apart."""
    torch.save(small_timm(kind).state_dict(), tmp_path / "w.pth")
    shape = ["encoder.num_heads=4", "data.image_size=32", "encoder.norm_eps=1e-5"]

    with pytest.raises(BundleError, match="may be of an encoder with rotary positions"):
        import_weights(str(tmp_path / "w.pth"), tmp_path / "b", overrides=shape)

    rope = "dinov3" if kind == "dinov3" else "eva02"
    said = [*shape, f"encoder.rope={rope}"]
    card = import_weights(str(tmp_path / "w.pth"), tmp_path / "b", overrides=said).card
    assert (card.encoder.rope, card.encoder.key_bias) == (rope, False)


@pytest.mark.parametrize("options", [{"rope_grid_indexing": "xy"}, {"rope_type": "mixed"}])
def test_timm__refuses_other_rotary_positions(tmp_path: Path, options: dict[str, Any]):
    save_for_hf(small_timm("eva02", **options), str(tmp_path / "t"), safe_serialization=True)
    with pytest.raises(BundleError, match="its rotary positions .* are of another kind"):
        import_weights(str(tmp_path / "t"), tmp_path / "b")


def test_import__a_size_that_patches_do_not_cover(tmp_path: Path, zoo: Any):
    """As SigLIP's 384 pixels of patches of 14, whose last pixels enter nothing."""
    theirs = small_timm("siglip", img_size=38)
    save_for_hf(theirs, str(tmp_path / "t"), safe_serialization=True)

    imported = import_weights(str(tmp_path / "t"), tmp_path / "b")

    assert imported.card.image_size == (32, 32)
    assert "of 32x32 pixels: the source takes 38x38" in imported.notes[-1]
    images = zoo.images(38)
    found = load_bundle(tmp_path / "b").encoder(images[..., :32, :32])
    torch.testing.assert_close(found.tokens, theirs.forward_features(images), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("patch_embed.proj.weight", (32, 3, 4, 4), "pos_embed is"),
        ("patch_embed.proj.weight", (32, 5, 8, 8), "'data.channels' is 5"),
        ("reg_token", None, "pos_embed is"),
        ("blocks.1.mlp.fc1.weight", (40, 32), "blocks.1.mlp.fc1.weight is .40, 32., wanted"),
        ("blocks.2.ls1.gamma", None, "missing blocks.2.ls1.gamma"),
    ],
)
def test_timm__shapes_that_do_not_fit_are_named(
    tmp_path: Path, key: str, value: tuple[int, ...] | None, message: str
):
    save_for_hf(small_timm("registers with places"), str(tmp_path / "t"), safe_serialization=True)
    state = load_file(tmp_path / "t/model.safetensors")
    del state[key]
    if value is not None:
        state[key] = torch.zeros(value)
    save_file(state, tmp_path / "t/model.safetensors")
    with pytest.raises((BundleError, ConfigError), match=message):
        import_weights(str(tmp_path / "t"), tmp_path / "b")
