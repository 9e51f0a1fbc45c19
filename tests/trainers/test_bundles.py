from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mimray.trainers import load_bundle, load_method
from mimray.trainers.bundles import (
    CARD,
    ENCODER,
    METHOD,
    BundleCard,
    read_card,
    save_bundle,
    spread_layers,
)
from mimray.trainers.config.model import ViTConfig
from mimray.trainers.config.run import Recipe, parse_recipe
from mimray.trainers.errors import BundleError, StorageError
from mimray.trainers.methods.base import Method
from mimray.trainers.methods.catalogue import build_method


def recipe_of() -> Recipe:
    return parse_recipe(
        {
            "encoder": {"name": "vit", "width": 16, "depth": 4, "num_heads": 2, "patch_size": 8},
            "method": {
                "name": "mae",
                "decoder_width": 8,
                "decoder_depth": 1,
                "decoder_num_heads": 2,
                "norm_pix_loss": True,
            },
            "data": {"image_size": [16, 24]},
            "optim": {"batch_size": 8, "steps": 10},
        }
    )


@pytest.fixture(scope="module")
def method() -> Method:
    torch.manual_seed(0)
    return build_method(recipe_of()).eval()


def save(method: Method, folder: Path, *, decoder: bool = True) -> BundleCard:
    recipe = method.recipe
    card = BundleCard(
        name="tiny",
        encoder=recipe.encoder,
        image_size=recipe.data.image_size,
        channels=3,
        mean=recipe.data.mean,
        std=recipe.data.std,
        layers=(1, 3),
        method="mae",
        recipe=recipe.model_dump(mode="json"),
    )
    rest = {k: v for k, v in method.state_dict().items() if not k.startswith("encoder.")}
    return save_bundle(folder, card, method.encoder.state_dict(), rest if decoder else None)


def test_bundle__round_trip(tmp_path: Path, method: Method):
    written = save(method, tmp_path / "bundle")
    images = torch.randn(2, 3, 16, 24)

    encoder = load_bundle(tmp_path / "bundle")

    assert encoder.card == written == read_card(tmp_path / "bundle")
    assert len(written.weights_sha256) == 64
    ours, theirs = encoder(images), method.encoder(images)
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.pooled, ours.tokens.mean(dim=1))
    assert ours.grid == (2, 3)
    maps, chosen = encoder.features(images), method.encoder.features(images, (1, 3))
    assert [tuple(m.shape) for m in maps] == [(2, 16, 2, 3)] * 2
    assert all(torch.equal(a, b) for a, b in zip(maps, chosen, strict=True))
    assert encoder.strides == (8, 8, 8, 8)


def test_bundle__is_frozen(tmp_path: Path, method: Method):
    save(method, tmp_path / "bundle")

    encoder = load_bundle(tmp_path / "bundle").train()

    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder(torch.randn(1, 3, 16, 24)).tokens.requires_grad


def test_bundle__of_a_run_is_found_in_it(tmp_path: Path, method: Method):
    save(method, tmp_path / "run/bundle")

    assert load_bundle(tmp_path / "run").card.name == "tiny"


def test_load_method__gives_the_same_outputs(tmp_path: Path, method: Method):
    save(method, tmp_path / "run/bundle")
    images, mask = torch.randn(2, 3, 16, 24), torch.tensor([[True] * 4 + [False] * 2] * 2)

    loaded = load_method(tmp_path / "run")

    ours, theirs = loaded(images, mask), method(images, mask)
    assert not loaded.training
    assert torch.equal(ours.loss, theirs.loss)
    assert torch.equal(ours.prediction, theirs.prediction)
    assert torch.equal(loaded.reconstruct(images, ours), method.reconstruct(images, theirs))


def test_load_method__needs_the_decoder(tmp_path: Path, method: Method):
    save(method, tmp_path / "bundle", decoder=False)

    load_bundle(tmp_path / "bundle")
    with pytest.raises(BundleError, match="encoder alone"):
        load_method(tmp_path / "bundle")


def test_load_bundle__refuses_changed_weights(tmp_path: Path, method: Method):
    save(method, tmp_path / "bundle")
    weights = bytearray((tmp_path / "bundle" / ENCODER).read_bytes())
    weights[-1] ^= 1
    (tmp_path / "bundle" / ENCODER).write_bytes(weights)

    with pytest.raises(BundleError, match="does not match its checksum"):
        load_bundle(tmp_path / "bundle")
    load_bundle(tmp_path / "bundle", verify=False)


def test_load_bundle__lists_keys_and_shapes_that_do_not_fit(tmp_path: Path, method: Method):
    save(method, tmp_path / "bundle")
    path = tmp_path / "bundle" / ENCODER
    state = load_file(path)
    state["head.weight"] = state.pop("norm.weight")
    state["norm.bias"] = torch.zeros(3)
    save_file(state, path)

    with pytest.raises(BundleError) as caught:
        load_bundle(tmp_path / "bundle", verify=False)

    for part in (
        "missing norm.weight",
        "unexpected head.weight",
        "norm.bias is (3,), wanted (16,)",
    ):
        assert part in str(caught.value)


def test_load_bundle__a_whole_wrong_model_is_told_in_one_line(tmp_path: Path, method: Method):
    save(method, tmp_path / "bundle")
    save_file({"x": torch.zeros(1)}, tmp_path / "bundle" / ENCODER)

    with pytest.raises(BundleError, match=r"missing .* and \d+ more$"):
        load_bundle(tmp_path / "bundle", verify=False)


@pytest.mark.parametrize("file", [ENCODER, METHOD])
def test_load_method__a_cut_off_file_is_refused(tmp_path: Path, method: Method, file: str):
    save(method, tmp_path / "bundle")
    path = tmp_path / "bundle" / file
    path.write_bytes(path.read_bytes()[:-50])

    with pytest.raises(BundleError, match=f"{file} does not match its checksum"):
        load_method(tmp_path / "bundle")


@pytest.mark.parametrize(
    "text", ["{", '{"format": 1}', '{"format": 2}', "[]", "\xff"], ids=lambda t: repr(t)
)
def test_read_card__refuses_what_is_not_one(tmp_path: Path, text: str):
    (tmp_path / CARD).write_bytes(text.encode("latin-1"))

    with pytest.raises(BundleError, match=f"{CARD} cannot be read"):
        read_card(tmp_path)


def test_load_bundle__says_what_is_missing(tmp_path: Path, method: Method):
    save(method, tmp_path / "bundle")
    (tmp_path / "bundle" / ENCODER).unlink()
    (tmp_path / "empty").mkdir()

    with pytest.raises(BundleError, match=f"has no {ENCODER}"):
        load_bundle(tmp_path / "bundle")
    with pytest.raises(BundleError, match="no bundle at"):
        load_bundle(tmp_path / "none")
    with pytest.raises(BundleError, match=r"neither a bundle nor a run.*mimray export"):
        load_bundle(tmp_path / "empty")


def test_save_bundle__replaces_a_bundle_but_nothing_else(tmp_path: Path, method: Method):
    save(method, tmp_path / "bundle")
    save(method, tmp_path / "bundle", decoder=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years")

    with pytest.raises(BundleError, match="exists and is not a bundle"):
        save(method, tmp_path / "mine")

    assert sorted(p.name for p in (tmp_path / "bundle").iterdir()) == [CARD, ENCODER]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "mine"]


def test_save_bundle__a_full_disk_leaves_the_old_one(tmp_path: Path, method: Method):
    save(method, tmp_path / "bundle", decoder=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # as a full disk, for any user

    try:
        with pytest.raises(StorageError, match="bundle: File too large"):
            save(method, tmp_path / "bundle")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    load_bundle(tmp_path / "bundle")
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_card__of_an_earlier_version_goes_without_its_retired_keys():
    card = BundleCard(
        name="it", encoder=ViTConfig(name="vit", width=16, depth=1, num_heads=2, patch_size=8),
        image_size=(16, 16), channels=3, mean=(0.5,) * 3, std=(0.2,) * 3,
        recipe={"method": {"name": "dvae", "revive_below": 2.0, "codebook_size": 16}},
    )  # fmt: skip

    assert card.recipe == {"method": {"name": "dvae", "codebook_size": 16}}


def test_card__survives_json_and_refuses_unknown_keys(tmp_path: Path, method: Method):
    save(method, tmp_path / "bundle")
    path = tmp_path / "bundle" / CARD
    tree = json.loads(path.read_text())

    path.write_text(json.dumps({**tree, "pickle": "no"}))

    with pytest.raises(BundleError, match="1 validation error"):
        read_card(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("depth", "layers"),
    [(12, (2, 5, 8, 11)), (24, (5, 11, 17, 23)), (8, (1, 3, 5, 7)), (3, (0, 1, 2)), (1, (0,))],
)
def test_spread_layers__ends_at_the_last(depth: int, layers: tuple[int, ...]):
    assert spread_layers(depth) == layers
