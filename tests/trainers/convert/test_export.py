"""Bundles in the layouts of timm and transformers, loaded there, and back again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from mimray.trainers import load_method
from mimray.trainers.bundles import BundleCard, save_bundle
from mimray.trainers.config.run import Recipe, parse_recipe
from mimray.trainers.convert import export_timm, export_transformers, import_weights
from mimray.trainers.errors import BundleError
from mimray.trainers.methods.base import Method
from mimray.trainers.methods.catalogue import build_method

VIT = {"name": "vit", "width": 48, "depth": 3, "num_heads": 4, "patch_size": 8, "mlp_ratio": 3.0}
BEIT = VIT | {"positions": "none", "rel_pos_bias": "shared", "layer_scale": 0.1, "init": "beit"}
SWIN = {
    "name": "swin", "width": 16, "depths": [2, 2], "num_heads": [2, 4], "patch_size": 4,
    "window_size": 4, "mlp_ratio": 3.0,
}  # fmt: skip
METHODS = {
    "mae": {"decoder_width": 32, "decoder_depth": 2, "decoder_num_heads": 2},
    "simmim": {"mask_unit_px": None},
    "beit": {"vocab_size": 11, "min_block_patches": 4},
    "maskfeat": {"min_block_patches": 4},
    "ae": {"decoder_widths": [8, 8]},
}


def recipe_of(method: str, encoder: dict[str, Any], **data: Any) -> Recipe:
    return parse_recipe(
        {
            "encoder": encoder,
            "method": {"name": method, **METHODS[method]},
            "data": {"image_size": [32, 32], **data},
            "optim": {"batch_size": 8, "steps": 10},
        }
    )


def bundle_of(method: Method, folder: Path, *, head: bool = True, **changes: Any) -> Path:
    recipe = method.recipe
    card = BundleCard(
        name="parity",
        encoder=recipe.encoder,
        image_size=recipe.data.image_size,
        channels=recipe.data.channels,
        mean=recipe.data.mean,
        std=recipe.data.std,
        layers=(0, 1),
        method=recipe.method.name,
        data_fingerprint="f1n9e2",
        recipe=recipe.model_dump(mode="json"),
    ).model_copy(update=changes)
    rest = {k: v for k, v in method.state_dict().items() if not k.startswith("encoder.")}
    save_bundle(folder, card, method.encoder.state_dict(), rest if head else None)
    return folder


def trained(zoo: Any, method: str, encoder: dict[str, Any], **data: Any) -> Method:
    """Nothing is at its first value but fixed positions and, as in BEiT, biases of keys."""
    made: Method = build_method(recipe_of(method, encoder, **data))
    fixed = {n: p.clone() for n, p in made.named_parameters() if not p.requires_grad}
    zoo.trained_like(made)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name in fixed:
                parameter.copy_(fixed[name])
            elif encoder is BEIT and name.endswith("attn.qkv.bias"):
                parameter.chunk(3)[1].zero_()
    return made


ENCODERS = [
    VIT,
    VIT | {"positions": "learned", "layer_scale": 0.1},
    VIT | {"positions": "none"},
    BEIT,
    VIT | {"positions": "learned", "rel_pos_bias": "per_block"},
    SWIN,
]


@pytest.mark.parametrize("size", [(32, 32), (32, 64)])
@pytest.mark.parametrize("encoder", ENCODERS, ids=str)
def test_export_timm__features_are_the_same(
    tmp_path: Path, zoo: Any, encoder: dict[str, Any], size: tuple[int, int]
):
    # With biases of keys that are not zero, which Beit has no place for and needs none.
    method = trained(zoo, "simmim", encoder | {}, image_size=size, channels=1)
    export_timm(bundle_of(method, tmp_path / "bundle"), tmp_path / "out")

    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()

    images = zoo.images(size, channels=1)
    ours = method.encoder(images)
    tokens = theirs.forward_features(images)
    if encoder is SWIN:
        zoo.close(tokens.flatten(1, 2), ours.tokens)
    else:
        zoo.close(tokens, torch.cat([ours.prefix, ours.tokens], dim=1))
    zoo.close(theirs(images), ours.pooled)
    data = timm.data.resolve_data_config({}, model=theirs)
    assert data["input_size"] == (1, *size)
    assert (tuple(data["mean"]), tuple(data["std"])) == ((0.5,), (0.5,))


@pytest.mark.parametrize(
    ("method", "encoder", "kind", "name"),
    [
        ("mae", VIT | {"norm_eps": 1e-5}, "mae", "ViTMAEForPreTraining"),
        ("beit", BEIT, "beit", "BeitForMaskedImageModeling"),
        ("beit", ENCODERS[4], "beit", "BeitForMaskedImageModeling"),
        ("simmim", VIT, "vit", "ViTForMaskedImageModeling"),
        ("simmim", SWIN, "swin", "SwinForMaskedImageModeling"),
    ],
)
def test_export_transformers__loss_is_the_same(
    tmp_path: Path, zoo: Any, method: str, encoder: dict[str, Any], kind: str, name: str
):
    import transformers

    ours = trained(zoo, method, encoder)
    if method == "mae":  # the comparison hides 6 of 16
        tree = ours.recipe.model_dump() | {"method": {"name": "mae", "mask_ratio": 0.375}}
        tree["method"] |= METHODS["mae"]
        ours.recipe = parse_recipe(tree)
    bundle = bundle_of(ours, tmp_path / "bundle")

    assert export_transformers(bundle, tmp_path / "out") == name

    theirs, info = getattr(transformers, name).from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    zoo.same_loss(bundle, kind, theirs.eval())


@pytest.mark.parametrize("size", [(32, 32), (32, 64)])
@pytest.mark.parametrize(
    ("encoder", "name"),
    [
        (VIT | {"positions": "learned"}, "ViTModel"),
        (VIT | {"layer_scale": 0.1}, "BeitModel"),
        (BEIT, "BeitModel"),
        (SWIN, "SwinModel"),
    ],
)
def test_export_transformers__encoder_alone(
    tmp_path: Path, zoo: Any, encoder: dict[str, Any], name: str, size: tuple[int, int]
):
    import transformers

    method = trained(zoo, "maskfeat", encoder, image_size=size)
    bundle = bundle_of(method, tmp_path / "bundle", head=False)
    if name != "ViTModel" and size == (32, 64):
        with pytest.raises(BundleError, match=r"32x64.*squares only"):
            export_transformers(bundle, tmp_path / "out")
        return

    assert export_transformers(bundle, tmp_path / "out") == name

    options = {"add_pooling_layer": False} if name == "ViTModel" else {}
    theirs, info = getattr(transformers, name).from_pretrained(
        tmp_path / "out", output_loading_info=True, **options
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    images = zoo.images(size)
    ours = method.encoder(images)
    tokens = theirs.eval()(images).last_hidden_state
    zoo.close(tokens, torch.cat([ours.prefix, ours.tokens], dim=1))


@pytest.mark.parametrize(
    ("method", "encoder"),
    [("mae", VIT), ("beit", BEIT), ("simmim", ENCODERS[1]), ("simmim", SWIN)],
)
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_export__and_import_give_back_every_bit(
    tmp_path: Path, zoo: Any, library: str, method: str, encoder: dict[str, Any]
):
    bundle = bundle_of(trained(zoo, method, encoder), tmp_path / "bundle")
    export = {"timm": export_timm, "transformers": export_transformers}[library]
    name = export(bundle, tmp_path / "out")

    imported = import_weights(str(tmp_path / "out"), tmp_path / "back")

    assert (imported.left_out, imported.initialised) == ((), ())
    whole = library == "transformers" and not name.endswith("Model")
    assert imported.complete == whole
    for file in ("encoder", "method") if whole else ("encoder",):
        before = load_file(bundle / f"{file}.safetensors")
        after = load_file(tmp_path / f"back/{file}.safetensors")
        assert before.keys() == after.keys()
        for key, value in before.items():
            if name == "BeitModel" and key.endswith("qkv.bias"):
                # Beit has no bias of keys, which this one had.
                value.chunk(3)[1].zero_()
            assert torch.equal(value, after[key]), key
    card = imported.card
    first = json.loads((bundle / "bundle.json").read_text())
    shape = card.encoder.model_dump(mode="json")
    assert shape | {"init": 0} == first["encoder"] | {"init": 0}
    assert (card.image_size, card.mean, card.interpolation) == ((32, 32), card.mean, "bicubic")
    if whole:
        load_method(tmp_path / "back")


def test_export_transformers__preprocessor_gives_our_inference_view(tmp_path: Path, zoo: Any):
    from PIL import Image
    from transformers import ViTImageProcessorPil

    from mimray.trainers.data.transforms import inference_view
    from mimray.trainers.models.normalise import normalise

    method = trained(zoo, "mae", VIT)
    export_transformers(bundle_of(method, tmp_path / "bundle"), tmp_path / "out")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 41, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)

    processor = ViTImageProcessorPil.from_pretrained(tmp_path / "out")
    theirs = processor(picture, return_tensors="pt")["pixel_values"]
    view = torch.from_numpy(inference_view(picture, (32, 32), "bicubic"))[None]

    data = method.recipe.data
    zoo.close(theirs, normalise(view, data.mean, data.std))


def test_export_transformers__refuses_what_vitmae_cannot_hold(tmp_path: Path, zoo: Any):
    wide = bundle_of(trained(zoo, "mae", VIT, image_size=(24, 48)), tmp_path / "wide")
    alone = bundle_of(trained(zoo, "mae", VIT), tmp_path / "alone", head=False)
    scaled = bundle_of(trained(zoo, "mae", VIT | {"layer_scale": 0.1}), tmp_path / "scaled")

    with pytest.raises(BundleError, match="24x48"):
        export_transformers(wide, tmp_path / "out")
    with pytest.raises(BundleError, match="encoder alone"):
        export_transformers(alone, tmp_path / "out")
    with pytest.raises(BundleError, match="scaled layers"):
        export_transformers(scaled, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "scaled", "wide"]


def test_export_transformers__a_decoder_of_ours_alone_is_left_out(tmp_path: Path, zoo: Any):
    import transformers

    tree = recipe_of("mae", VIT).model_dump()
    tree["method"] |= {"decoder": "cross", "encoder_layers": [0, 2]}
    method = zoo.trained_like(build_method(parse_recipe(tree)))
    bundle = bundle_of(method, tmp_path / "bundle")

    assert export_transformers(bundle, tmp_path / "out") == "ViTModel"

    theirs = transformers.ViTModel.from_pretrained(tmp_path / "out", add_pooling_layer=False)
    images = zoo.images((32, 32))
    ours = method.encoder(images)
    tokens = theirs.eval()(images).last_hidden_state
    zoo.close(tokens, torch.cat([ours.prefix, ours.tokens], dim=1))
    export_timm(bundle, tmp_path / "timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    zoo.close(model.forward_features(images), tokens)


def test_export__refuses_encoders_of_ours_alone(tmp_path: Path, zoo: Any):
    conv = bundle_of(trained(zoo, "ae", {"name": "conv", "widths": [8, 8]}), tmp_path / "conv")
    other = bundle_of(trained(zoo, "mae", VIT | {"norm_eps": 1e-5}), tmp_path / "eps")

    for export in (export_timm, export_transformers):
        with pytest.raises(BundleError, match="has no encoder conv"):
            export(conv, tmp_path / "out")
    with pytest.raises(BundleError, match=r"epsilon 1e-05.*--set encoder\.norm_eps"):
        export_timm(other, tmp_path / "out")


def test_export__replaces_nothing(tmp_path: Path, zoo: Any):
    bundle = bundle_of(trained(zoo, "mae", VIT), tmp_path / "bundle")
    (tmp_path / "out").mkdir()

    export_timm(bundle, tmp_path / "out")

    with pytest.raises(BundleError, match="not empty"):
        export_transformers(bundle, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "out"]
    assert "f1n9e2" in (tmp_path / "out/README.md").read_text()
    json.loads((tmp_path / "out/config.json").read_text())


def test_export__model_card_says_data_recipe_scores_and_limits(tmp_path: Path, zoo: Any):
    scores = {"knn": {"accuracy": 0.61, "command": "mimray evaluate runs/x --task knn"}}
    bundle = bundle_of(
        trained(zoo, "simmim", SWIN), tmp_path / "bundle", scores=scores, step=10, samples=80
    )

    export_transformers(bundle, tmp_path / "out")

    text = (tmp_path / "out/README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\n")
    for part in (
        "SwinForMaskedImageModeling.from_pretrained(",
        "10 updates, 80 pictures",
        "f1n9e2",
        "mimray evaluate runs/x --task knn",
        "## Limits",
        "32x32",
        '"mask_ratio": 0.6',
    ):
        assert part in text
