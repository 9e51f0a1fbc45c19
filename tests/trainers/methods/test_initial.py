"""Weights to begin with: what a method takes of them, and what follows from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mimray.trainers.bundles import read_card
from mimray.trainers.config.advice import advice
from mimray.trainers.config.run import Recipe, parse_recipe
from mimray.trainers.config.schedule import Schedule
from mimray.trainers.engine.export import write_bundle
from mimray.trainers.methods.base import Method
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.methods.needs import (
    initial_lines,
    with_needs,
)
from mimray.trainers.models.averages import MovingAverages
from mimray.trainers.models.resize import resized
from mimray.trainers.storage import RunDir
from mimray.trainers.weights import fetch_weights
from tests.trainers.methods.initial_cases import CASES, begun, donate, plan_of, recipe_of


@pytest.mark.parametrize("case", CASES)
def test_begin__a_method_begins_with_all_that_its_bundle_has(
    case: str, donors: Path, tmp_path: Path
):
    donor = donate(case, donors, f"{case}-again")
    recipe = with_needs(recipe_of(case, donors, init=str(donors / f"{case}-again")))

    found = begun(recipe, tmp_path / "run").state_dict()

    card = read_card(donors / f"{case}-again")
    digest = getattr(recipe.method, f"{recipe.method.init_key}_sha256")
    assert (digest == card.weights_sha256) == (case == "finetune")
    assert len(digest) == 64
    fresh = {"head.weight", "head.bias", "encoder.norm.weight", "encoder.norm.bias"}
    fixed = {"decoder.pos_embed", *(n for n in found if n.startswith("averages.residuals."))}
    for name in found.keys() - fixed - (fresh if case == "finetune" else set()):
        assert torch.equal(found[name], donor[name]), name


def test_begin__without_a_bundle_nothing_is_changed(donors: Path):
    recipe = recipe_of("mae", donors)

    assert with_needs(recipe) is recipe
    assert initial_lines(recipe, recipe, fetch_weights, None) == []


def test_begin__another_method_gives_its_encoder_alone(donors: Path, tmp_path: Path):
    asked = recipe_of("simmim", donors, init=str(donors / "mae"))
    recipe = with_needs(asked)

    method = begun(recipe, tmp_path / "run")

    card = read_card(donors / "mae")
    assert recipe.method.init_sha256 == card.weights_sha256
    assert not (tmp_path / "run/initial/method.safetensors").exists()
    torch.manual_seed(0)
    fresh = build_method(recipe).state_dict()
    assert torch.equal(method.state_dict()["head.weight"], fresh["head.weight"])
    lines = initial_lines(recipe, asked, fetch_weights, None)
    assert lines[0].startswith(
        f"begins with the encoder of {donors / 'mae'} (mae, 7 steps, sha256 "
    )
    assert lines[1] == "fresh: mask_token, head.weight, head.bias"


def test_begin__positions_are_fitted_and_trained(donors: Path, tmp_path: Path):
    asked = recipe_of("mae", donors, size=[24, 16], init=str(donors / "mae"))
    recipe = with_needs(asked)

    method = begun(recipe, tmp_path / "run")

    donor = donate("mae", donors, "mae-small")
    theirs = {"pos_embed": donor["encoder.pos_embed"]}
    wanted = resized(theirs, (asked.encoder, (16, 16)), (recipe.encoder, (24, 16)))
    table = method.encoder.get_parameter("pos_embed")
    assert torch.equal(table, wanted["pos_embed"])
    assert table.requires_grad
    decoder = method.get_parameter("decoder.pos_embed")
    assert not decoder.requires_grad
    assert decoder.abs().max() <= 1  # sines and cosines of its own
    lines = initial_lines(recipe, asked, fetch_weights, None)
    assert "positions are interpolated from 16x16 to 24x16 pixels" in lines
    assert "positions are those of the weights, and trained" in lines


def test_begin__what_the_recipe_leaves_out_follows_from_the_weights(donors: Path, tmp_path: Path):
    made = recipe_of("mae", donors)
    encoder = made.encoder.model_copy(update={"layer_scale": 0.1, "norm_eps": 1e-5})
    data = made.data.model_copy(update={"mean": (0.5,) * 3, "std": (0.5,) * 3})
    donor = made.model_copy(update={"encoder": encoder, "data": data})
    state = build_method(donor).state_dict()
    write_bundle(RunDir(str(tmp_path / "a")), plan_of(donor, donors), state, step=1, name="a",
                 command="")  # fmt: skip

    asked = recipe_of("simmim", donors, init=str(tmp_path / "a"))
    recipe = with_needs(asked)

    assert (recipe.encoder.layer_scale, recipe.encoder.norm_eps) == (0.1, 1e-5)
    assert recipe.data.mean == (0.5, 0.5, 0.5)
    assert begun(recipe, tmp_path / "run").encoder.state_dict().keys() == {
        key.removeprefix("encoder.") for key in state if key.startswith("encoder.")
    }
    follows = initial_lines(recipe, asked, fetch_weights, None)[1]
    assert "encoder.layer_scale 0.1, encoder.norm_eps 1e-05, data.mean (0.5, 0.5, 0.5)" in follows


def test_begin__a_head_that_does_not_fit_is_fresh_as_a_whole(donors: Path, tmp_path: Path):
    asked = recipe_of("mae", donors, init=str(donors / "mae"), decoder_depth=2)
    recipe = with_needs(asked)

    method = begun(recipe, tmp_path / "run")

    torch.manual_seed(0)
    fresh = build_method(recipe).state_dict()
    for name, value in method.state_dict().items():
        assert name.startswith("encoder.") or torch.equal(value, fresh[name]), name
    text = "\n".join(initial_lines(recipe, asked, fetch_weights, None))
    assert "does not fit (decoder.blocks.1." in text
    assert "is fresh; --partial takes what fits" in text


@pytest.mark.parametrize(("ours", "theirs"), [("mae-cross", "mae"), ("mae", "mae-cross")])
def test_begin__the_other_decoder_of_mae_is_left_out(
    ours: str, theirs: str, donors: Path, tmp_path: Path
):
    donor = donate(theirs, donors, f"{theirs}-donor")
    asked = recipe_of(ours, donors, init=str(donors / f"{theirs}-donor"))
    recipe = with_needs(asked)

    found = begun(recipe, tmp_path / "run").state_dict()

    torch.manual_seed(0)
    fresh = build_method(recipe).state_dict()
    for name, value in found.items():
        wanted = donor if name.startswith("encoder.") else fresh
        assert torch.equal(value, wanted[name]), name
    text = "\n".join(initial_lines(recipe, asked, fetch_weights, None))
    assert "its mae head or decoder does not fit (decoder." in text
    assert "is fresh; --partial takes what fits" in text
    method = recipe.method.model_copy(update={"init_partial": True})
    partly = begun(recipe.model_copy(update={"method": method}), tmp_path / "partly").state_dict()
    for name in ("decoder.pred.weight", "decoder.mask_token", "decoder.blocks.0.mlp.fc1.weight"):
        assert torch.equal(partly[name], donor[name]), name


def test_begin__the_head_of_another_tokenizer_is_left_out(donors: Path, tmp_path: Path):
    donate("dvae", donors, "dvae-other", ema_decay=0.5)
    file = donors / "dvae-other" / "bundle" / "bundle.json"
    assert read_card(file.parent).method_sha256 != read_card(donors / "dvae").method_sha256
    asked = recipe_of("beit", donors, init=str(donors / "beit"))
    other = asked.method.model_copy(update={"tokenizer": str(donors / "dvae-other")})

    for method, taken in ((asked.method, True), (other, False)):
        recipe = with_needs(asked.model_copy(update={"method": method}))
        run = tmp_path / f"run-{taken}"
        begun(recipe, run)
        assert (run / "initial" / "method.safetensors").exists() == taken


def test_averages__begin_with_the_same_weights(donors: Path):
    class Averaged(Method):
        def __init__(self, recipe: Recipe) -> None:
            super().__init__(recipe)
            inner = build_method(recipe)
            self.encoder, self.head = inner.encoder, nn.Linear(3, 2)
            followed = {"encoder": self.encoder, "head": self.head}
            self.averages = MovingAverages(followed, Schedule(start=0.9))

        def forward(self, images: Any, mask: Any = None) -> Any:
            raise NotImplementedError

    method = Averaged(recipe_of("mae", donors))
    encoder = {k: v + 1 for k, v in method.encoder.state_dict().items()}

    method.begin_with(encoder, {"head.weight": torch.full((2, 3), 4.0)})

    state = method.state_dict()
    assert torch.equal(state["averages.head.weight"], torch.full((2, 3), 4.0))
    for key, value in encoder.items():
        assert torch.equal(state[f"averages.encoder.{key}"], value), key


def test_advice__a_rate_that_forgets_the_weights(donors: Path):
    tree = recipe_of("mae", donors, init=str(donors / "mae")).model_dump()
    tree["optim"] |= {"base_lr": 0.06, "warmup_steps": 1}

    warned = "\n".join(advice(plan_of(with_needs(parse_recipe(tree)), donors)))

    assert "begins with trained weights" in warned
    fresh = parse_recipe({**tree, "method": {**tree["method"], "init": ""}})
    assert "begins with trained weights" not in "\n".join(advice(plan_of(fresh, donors)))
