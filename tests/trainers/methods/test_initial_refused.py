"""Weights to begin with that do not fit: refused with the cure, or taken in part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mimray.trainers.bundles import BundleCard, save_bundle
from mimray.trainers.config.run import parse_recipe
from mimray.trainers.engine.export import write_bundle
from mimray.trainers.errors import BundleError, ConfigError
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.methods.needs import (
    initial_lines,
    with_needs,
)
from mimray.trainers.storage import RunDir
from mimray.trainers.weights import fetch_weights
from tests.trainers.methods.cases import METHODS, SWIN, VIT
from tests.trainers.methods.initial_cases import STEPS, begun, donate, plan_of, recipe_of


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"encoder": VIT | {"width": 32}},
            r"encoder\.width 32, there 16; cls_token is \(1, 1, 16\), wanted \(1, 1, 32\), .* and "
            r"\d+ more \(--set encoder\.width=16, or --partial for the weights that fit\)$",
        ),
        (
            {"encoder": VIT | {"patch_size": 8}},
            r"encoder\.patch_size 8, there 4; .*patch_embed\.proj\.weight is \(16, 3, 4, 4\), "
            r"wanted \(16, 3, 8, 8\)",
        ),
        (
            {"encoder": VIT | {"patch_size": 5}, "data": {"image_size": 25}},
            r"--set encoder\.patch_size=4 --set data\.image_size=\[24,24\]",
        ),
        (
            {"data": {"image_size": 16, "channels": 1, "mean": [0.5], "std": [0.5]}},
            r"reads 3 channels, data\.channels is 1 \(--set data\.channels=3",
        ),
        (
            {"encoder": SWIN, "method": METHODS["simmim"]},
            "another encoder than the recipe: swin, there vit",
        ),
    ],
)
def test_begin__weights_of_another_shape_are_refused_with_the_cure(
    changes: dict[str, Any], message: str, donors: Path
):
    tree = {
        "encoder": VIT, "method": METHODS["mae"], "data": {"image_size": 16},
        "optim": {"batch_size": 4, "steps": STEPS},
    } | changes  # fmt: skip
    tree["method"] = {**tree["method"], "init": str(donors / "mae")}

    with pytest.raises(ConfigError, match=message):
        with_needs(parse_recipe(tree))


def test_begin__weights_that_the_method_cannot_use_are_refused(donors: Path, tmp_path: Path):
    made = recipe_of("simmim", donors)
    encoder = made.encoder.model_copy(update={"rel_pos_bias": "shared"})
    donor = made.model_copy(update={"encoder": encoder})
    state = build_method(donor).state_dict()
    write_bundle(RunDir(str(tmp_path / "a")), plan_of(donor, donors), state, step=1, name="a",
                 command="")  # fmt: skip

    with pytest.raises(ConfigError, match="go with the recipe: method mae .* needs positions"):
        with_needs(recipe_of("mae", donors, init=str(tmp_path / "a")))
    tree = recipe_of("simmim", donors, init=str(tmp_path / "a")).model_dump()
    tree["encoder"]["rel_pos_bias"] = "per_block"  # each begins with the one that they shared
    method = begun(with_needs(parse_recipe(tree)), tmp_path / "run")
    table = "rel_pos_bias.relative_position_bias_table"
    assert torch.equal(method.encoder.state_dict()[f"blocks.1.{table}"], state[f"encoder.{table}"])


@pytest.mark.parametrize("name", ["encoder.safetensors", "method.safetensors"])
def test_begin__damaged_weights_are_refused_before_anything_starts(
    name: str, donors: Path, tmp_path: Path
):
    donate("mae", donors, "mae-damaged")
    file = donors / "mae-damaged" / "bundle" / name
    file.write_bytes(file.read_bytes()[:-100])

    with pytest.raises(BundleError, match=rf"{name} (cannot be read|does not match its checksum)"):
        with_needs(recipe_of("mae", donors, init=str(donors / "mae-damaged")))


def test_partial__takes_what_fits_and_lists_the_rest(donors: Path, tmp_path: Path):
    donor = donate("mae", donors, "mae-partial")
    tree = recipe_of("mae", donors, init=str(donors / "mae-partial")).model_dump()
    tree["method"] |= {"init_partial": True, "decoder_depth": 2}
    tree["encoder"] |= {"patch_size": 8, "depth": 3}
    asked = parse_recipe(tree)
    recipe = with_needs(asked)

    found = begun(recipe, tmp_path / "run").state_dict()

    assert torch.equal(found["encoder.blocks.1.mlp.fc1.weight"],
                       donor["encoder.blocks.1.mlp.fc1.weight"])  # fmt: skip
    assert torch.equal(found["decoder.embed.weight"], donor["decoder.embed.weight"])
    line = initial_lines(recipe, asked, fetch_weights, None)[-1]
    assert line.startswith("fresh: encoder.patch_embed.proj.weight, encoder.blocks.2.")
    whole = recipe.model_copy(
        update={"method": recipe.method.model_copy(update={"init_partial": False})}
    )
    plans = [plan_of(one, donors) for one in (recipe, whole)]
    assert plans[0].hash != plans[1].hash


def test_partial__what_stays_fresh_is_not_fixed_by_adapters(donors: Path):
    donate("mae", donors, "mae-adapted")
    tree = recipe_of(
        "mae", donors, init=str(donors / "mae-adapted"), init_partial=True
    ).model_dump()
    tree["encoder"]["depth"] = 3
    tree["lora"] = {"rank": 2}

    with pytest.raises(ConfigError, match=r"nothing that fits blocks\.2\..*lora\.trained"):
        with_needs(parse_recipe(tree))
    tree["lora"]["trained"] = ["blocks.2.*", "norm.*"]
    assert with_needs(parse_recipe(tree)).encoder.num_layers == 3


def test_partial__nothing_that_fits_is_refused(donors: Path, tmp_path: Path):
    config = recipe_of("mae", donors).encoder
    card = BundleCard(
        name="it", encoder=config, image_size=(16, 16), channels=3, mean=(0.5,) * 3, std=(0.2,) * 3
    )
    save_bundle(tmp_path / "odd", card, {"elsewhere": torch.ones(3)})
    for partial, cure in ((True, "other weights"), (False, "other weights")):
        with pytest.raises(BundleError, match=rf"does not fit vit: .*\({cure}"):
            with_needs(recipe_of("mae", donors, init=str(tmp_path / "odd"), init_partial=partial))
