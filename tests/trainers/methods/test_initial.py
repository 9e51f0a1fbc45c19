"""Weights to begin with: what follows from them, what fits, and every method's runs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

from mimray.service.commands.serve import resolve as resolve_served
from mimray.trainers.bundles import BundleCard, read_card, save_bundle
from mimray.trainers.config.advice import advice
from mimray.trainers.config.run import Plan, Recipe, parse_recipe, resolve
from mimray.trainers.config.schedule import Schedule
from mimray.trainers.data.selection import open_training
from mimray.trainers.engine.deepspeed import prepare_process
from mimray.trainers.engine.export import write_bundle
from mimray.trainers.engine.loop import train
from mimray.trainers.engine.metrics import read_metrics
from mimray.trainers.errors import BundleError, ConfigError, MissingBundleError
from mimray.trainers.methods.base import Method
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.methods.needs import (
    initial_lines,
    keep_needs,
    load_needs,
    with_needs,
)
from mimray.trainers.models.averages import MovingAverages
from mimray.trainers.models.resize import resized
from mimray.trainers.storage import RunDir
from mimray.trainers.weights import fetch_weights

BATCH, STEPS = 4, 4
VIT = {"name": "vit", "width": 16, "depth": 2, "num_heads": 2, "patch_size": 4}
SWIN = {"name": "swin", "width": 8, "depths": [2, 1], "num_heads": [1, 2], "patch_size": 2,
        "window_size": 2}  # fmt: skip
CONV = {"name": "conv", "widths": [8, 12], "depth": 1}
BLOCKS = {"min_block_patches": 2, "mask_ratio": 0.5}
MAE = {"name": "mae", "decoder_width": 16, "decoder_depth": 1, "decoder_num_heads": 2}
CODED = {"name": "dvae", "codebook_size": 16, "code_dim": 4, "decoder_widths": [12, 8, 8],
         "decoder_blocks": 1, "min_usage": 0}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "mae": {"encoder": VIT, "method": MAE},
    "simmim": {"encoder": VIT, "method": {"name": "simmim", "mask_unit_px": 8}},
    "simmim-swin": {"encoder": SWIN, "method": {"name": "simmim", "mask_unit_px": 8}},
    "maskfeat": {"encoder": VIT, "method": {"name": "maskfeat", "hog_cell_px": 4, **BLOCKS}},
    "beit": {"encoder": VIT, "method": {"name": "beit", "tokenizer_image_size": 16, **BLOCKS}},
    "ae": {"encoder": CONV, "method": {"name": "ae", "latent_dim": 4,
                                       "decoder_widths": [12, 8, 8]}},
    "vae": {"encoder": CONV, "method": {"name": "vae", "latent_dim": 4,
                                        "decoder_widths": [12, 8, 8]}},
    "dvae": {"encoder": CONV, "method": CODED},
    "distill": {"encoder": VIT, "method": {"name": "distill", "teacher_image_size": 16, **BLOCKS}},
    "finetune": {"encoder": VIT, "method": {"name": "finetune", "num_classes": 2}},
}  # fmt: skip


class Observer:
    """Ends the run with an error at a step, as a lost worker would."""

    def __init__(self, cut_at: int | None = None) -> None:
        self.cut_at = cut_at

    def resumed(self, step: int) -> None: ...

    def metrics(self, row: dict[str, Any]) -> None:
        if row["step"] == self.cut_at:
            raise KeyboardInterrupt

    def pictures(self, step: int, panels: list[Any]) -> None: ...


def recipe_of(case: str, place: Path, *, stage: int = 0, size: Any = 16, **method: Any) -> Recipe:
    tree = {
        "encoder": CASES[case]["encoder"],
        "method": {**CASES[case]["method"], **method},
        "data": {"image_size": size, "num_workers": 0},
        # A large eps, since Adam makes whole steps of the rounding of gradients that are zero.
        "optim": {"batch_size": BATCH, "steps": STEPS, "base_lr": 0.05, "eps": 1e-2},
        "engine": {"zero_stage": stage, "precision": "fp32"},
        "checkpoint": {"every_steps": 1},
        "logging": {"every_steps": 1, "num_pictures": 1},
    }
    if case == "beit":
        tree["method"]["tokenizer"] = str(place / "dvae")
    if case == "distill":
        tree["method"]["teacher"] = str(place / "mae")
    return parse_recipe(tree)


def plan_of(recipe: Recipe, place: Path, world_size: int = 1) -> Plan:
    source = open_training(str(place / "pictures"), recipe)
    return resolve(recipe, source.facts, world_size)


def donate(case: str, place: Path, folder: str = "", **method: Any) -> dict[str, torch.Tensor]:
    """Write a bundle whose weights no initialisation gives; returns the method's state."""
    recipe = with_needs(recipe_of(case, place, **method))
    torch.manual_seed(5)
    state = build_method(recipe).state_dict()
    state = {k: v + 0.01 if v.is_floating_point() else v for k, v in state.items()}
    run = RunDir(str(place / (folder or case)))
    plan = plan_of(recipe, place)
    write_bundle(run, plan, state, step=7, name=case, command="test")
    return state


def learn(
    case: str, place: Path, run_name: str, *, stage: int = 0, cut_at: int | None = None
) -> dict[str, Any]:
    """The rows of metrics and the weights of a short run, in the process group there is."""
    run = RunDir(str(place / run_name))
    recipe = recipe_of(case, place, stage=stage, init=str(place / case))
    recipe = with_needs(recipe, run=run)
    plan = plan_of(recipe, place, dist.get_world_size())
    run.create()
    if dist.get_rank() == 0:
        keep_needs(recipe, run)
    if dist.get_world_size() > 1:
        dist.barrier()
    source = open_training(str(place / "pictures"), recipe)
    observer = Observer(cut_at)
    trained = train(plan, run, source, device=torch.device("cpu"), observer=observer)
    return {"rows": read_metrics(run), "state": trained.state}


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    losses = [[row["loss"] for row in one["rows"]] for one in (found, wanted)]
    assert len(losses[1]) == STEPS
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, value in wanted["state"].items():
        torch.testing.assert_close(found["state"][name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of two classes, and a bundle of every method."""
    place = tmp_path_factory.mktemp("initial")
    for i in range(12):
        folder = place / "pictures" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((24, 24)).save(folder / f"{i}.png")
    first = ("dvae", "mae")  # which others need
    for case in (*first, *(CASES.keys() - set(first))):
        donate(case, place)
    return place


def begun(recipe: Recipe, folder: Path) -> Method:
    """A method as a run has it before its first update."""
    run = RunDir(str(folder))
    keep_needs(recipe, run)
    torch.manual_seed(0)
    method = build_method(recipe)
    load_needs(method, run)
    return method


@pytest.mark.parametrize("case", CASES)
def test_begin__a_method_begins_with_all_that_its_bundle_has(
    case: str, place: Path, tmp_path: Path
):
    donor = donate(case, place, f"{case}-again")
    recipe = with_needs(recipe_of(case, place, init=str(place / f"{case}-again")))

    found = begun(recipe, tmp_path / "run").state_dict()

    card = read_card(place / f"{case}-again")
    digest = getattr(recipe.method, f"{recipe.method.init_key}_sha256")
    assert (digest == card.weights_sha256) == (case == "finetune")
    assert len(digest) == 64
    fresh = {"head.weight", "head.bias", "encoder.norm.weight", "encoder.norm.bias"}
    fixed = {"decoder.pos_embed"}
    for name in found.keys() - fixed - (fresh if case == "finetune" else set()):
        assert torch.equal(found[name], donor[name]), name


def test_begin__without_a_bundle_nothing_is_changed(place: Path):
    recipe = recipe_of("mae", place)

    assert with_needs(recipe) is recipe
    assert initial_lines(recipe, recipe, fetch_weights, None) == []


def test_begin__another_method_gives_its_encoder_alone(place: Path, tmp_path: Path):
    asked = recipe_of("simmim", place, init=str(place / "mae"))
    recipe = with_needs(asked)

    method = begun(recipe, tmp_path / "run")

    card = read_card(place / "mae")
    assert recipe.method.init_sha256 == card.weights_sha256
    assert not (tmp_path / "run/initial/method.safetensors").exists()
    torch.manual_seed(0)
    fresh = build_method(recipe).state_dict()
    assert torch.equal(method.state_dict()["head.weight"], fresh["head.weight"])
    lines = initial_lines(recipe, asked, fetch_weights, None)
    assert lines[0].startswith(f"begins with the encoder of {place / 'mae'} (mae, 7 steps, sha256 ")
    assert lines[1] == "fresh: mask_token, head.weight, head.bias"


def test_begin__positions_are_fitted_and_trained(place: Path, tmp_path: Path):
    asked = recipe_of("mae", place, size=[24, 16], init=str(place / "mae"))
    recipe = with_needs(asked)

    method = begun(recipe, tmp_path / "run")

    donor = donate("mae", place, "mae-small")
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


def test_begin__what_the_recipe_leaves_out_follows_from_the_weights(place: Path, tmp_path: Path):
    made = recipe_of("mae", place)
    encoder = made.encoder.model_copy(update={"layer_scale": 0.1, "norm_eps": 1e-5})
    data = made.data.model_copy(update={"mean": (0.5,) * 3, "std": (0.5,) * 3})
    donor = made.model_copy(update={"encoder": encoder, "data": data})
    state = build_method(donor).state_dict()
    write_bundle(RunDir(str(tmp_path / "a")), plan_of(donor, place), state, step=1, name="a",
                 command="")  # fmt: skip

    asked = recipe_of("simmim", place, init=str(tmp_path / "a"))
    recipe = with_needs(asked)

    assert (recipe.encoder.layer_scale, recipe.encoder.norm_eps) == (0.1, 1e-5)
    assert recipe.data.mean == (0.5, 0.5, 0.5)
    assert begun(recipe, tmp_path / "run").encoder.state_dict().keys() == {
        key.removeprefix("encoder.") for key in state if key.startswith("encoder.")
    }
    follows = initial_lines(recipe, asked, fetch_weights, None)[1]
    assert "encoder.layer_scale 0.1, encoder.norm_eps 1e-05, data.mean (0.5, 0.5, 0.5)" in follows


def test_begin__a_head_that_does_not_fit_is_fresh_as_a_whole(place: Path, tmp_path: Path):
    asked = recipe_of("mae", place, init=str(place / "mae"), decoder_depth=2)
    recipe = with_needs(asked)

    method = begun(recipe, tmp_path / "run")

    torch.manual_seed(0)
    fresh = build_method(recipe).state_dict()
    for name, value in method.state_dict().items():
        assert name.startswith("encoder.") or torch.equal(value, fresh[name]), name
    text = "\n".join(initial_lines(recipe, asked, fetch_weights, None))
    assert "does not fit (decoder.blocks.1." in text
    assert "is fresh; --partial takes what fits" in text


def test_begin__the_head_of_another_tokenizer_is_left_out(place: Path, tmp_path: Path):
    donate("dvae", place, "dvae-other", ema_decay=0.5)
    file = place / "dvae-other" / "bundle" / "bundle.json"
    assert read_card(file.parent).method_sha256 != read_card(place / "dvae").method_sha256
    asked = recipe_of("beit", place, init=str(place / "beit"))
    other = asked.method.model_copy(update={"tokenizer": str(place / "dvae-other")})

    for method, taken in ((asked.method, True), (other, False)):
        recipe = with_needs(asked.model_copy(update={"method": method}))
        run = tmp_path / f"run-{taken}"
        begun(recipe, run)
        assert (run / "initial" / "method.safetensors").exists() == taken


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
            {"encoder": SWIN, "method": {"name": "simmim", "mask_unit_px": 8}},
            "another encoder than the recipe: swin, there vit",
        ),
    ],
)
def test_begin__weights_of_another_shape_are_refused_with_the_cure(
    changes: dict[str, Any], message: str, place: Path
):
    tree = {
        "encoder": VIT, "method": MAE, "data": {"image_size": 16},
        "optim": {"batch_size": BATCH, "steps": STEPS},
    } | changes  # fmt: skip
    tree["method"] = {**tree["method"], "init": str(place / "mae")}

    with pytest.raises(ConfigError, match=message):
        with_needs(parse_recipe(tree))


def test_begin__weights_that_the_method_cannot_use_are_refused(place: Path, tmp_path: Path):
    made = recipe_of("simmim", place)
    encoder = made.encoder.model_copy(update={"rel_pos_bias": "shared"})
    donor = made.model_copy(update={"encoder": encoder})
    state = build_method(donor).state_dict()
    write_bundle(RunDir(str(tmp_path / "a")), plan_of(donor, place), state, step=1, name="a",
                 command="")  # fmt: skip

    with pytest.raises(ConfigError, match="go with the recipe: method mae .* needs positions"):
        with_needs(recipe_of("mae", place, init=str(tmp_path / "a")))
    tree = recipe_of("simmim", place, init=str(tmp_path / "a")).model_dump()
    tree["encoder"]["rel_pos_bias"] = "per_block"  # each begins with the one that they shared
    method = begun(with_needs(parse_recipe(tree)), tmp_path / "run")
    table = "rel_pos_bias.relative_position_bias_table"
    assert torch.equal(method.encoder.state_dict()[f"blocks.1.{table}"], state[f"encoder.{table}"])


@pytest.mark.parametrize("name", ["encoder.safetensors", "method.safetensors"])
def test_begin__damaged_weights_are_refused_before_anything_starts(
    name: str, place: Path, tmp_path: Path
):
    donate("mae", place, "mae-damaged")
    file = place / "mae-damaged" / "bundle" / name
    file.write_bytes(file.read_bytes()[:-100])

    with pytest.raises(BundleError, match=rf"{name} (cannot be read|does not match its checksum)"):
        with_needs(recipe_of("mae", place, init=str(place / "mae-damaged")))


def test_begin__the_licence_of_the_weights_goes_into_the_bundle(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    donate("mae", place, "mae-licensed")
    card = place / "mae-licensed" / "bundle" / "bundle.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"license": "CC-BY-NC-4.0"}))
    recipe = with_needs(recipe_of("simmim", place, init=str(place / "mae-licensed")))
    plan, run = plan_of(recipe, place), RunDir(str(tmp_path / "run"))
    keep_needs(recipe, run)

    made = write_bundle(run, plan, build_method(recipe).state_dict(), step=1, name="a", command="")

    assert (made.license, made.for_research_only) == ("CC-BY-NC-4.0", True)
    resolve_served(str(tmp_path / "run" / "bundle"))
    assert "is under the licence CC-BY-NC-4.0, which forbids" in capsys.readouterr().err


@pytest.mark.parametrize(
    "free", ["", "apache-2.0", "MIT", "DINOv3 License (https://x)", "nclicense"]
)
def test_card__licences_that_allow_a_service(place: Path, free: str):
    donate("mae", place, "mae-free")
    card = read_card(place / "mae-free" / "bundle")

    assert not card.model_copy(update={"license": free}).for_research_only
    for forbidding in ("cc-by-nc-sa-4.0 and MIT", "Non-Commercial Research"):
        assert card.model_copy(update={"license": forbidding}).for_research_only


def test_partial__takes_what_fits_and_lists_the_rest(place: Path, tmp_path: Path):
    donor = donate("mae", place, "mae-partial")
    tree = recipe_of("mae", place, init=str(place / "mae-partial")).model_dump()
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
    plans = [plan_of(one, place) for one in (recipe, whole)]
    assert plans[0].hash != plans[1].hash


def test_partial__what_stays_fresh_is_not_fixed_by_adapters(place: Path):
    donate("mae", place, "mae-adapted")
    tree = recipe_of("mae", place, init=str(place / "mae-adapted"), init_partial=True).model_dump()
    tree["encoder"]["depth"] = 3
    tree["lora"] = {"rank": 2}

    with pytest.raises(ConfigError, match=r"nothing that fits blocks\.2\..*lora\.trained"):
        with_needs(parse_recipe(tree))
    tree["lora"]["trained"] = ["blocks.2.*", "norm.*"]
    assert with_needs(parse_recipe(tree)).encoder.num_layers == 3


def test_partial__nothing_that_fits_is_refused(place: Path, tmp_path: Path):
    config = recipe_of("mae", place).encoder
    card = BundleCard(
        name="it", encoder=config, image_size=(16, 16), channels=3, mean=(0.5,) * 3, std=(0.2,) * 3
    )
    save_bundle(tmp_path / "odd", card, {"elsewhere": torch.ones(3)})
    for partial, cure in ((True, "other weights"), (False, "other weights")):
        with pytest.raises(BundleError, match=rf"does not fit vit: .*\({cure}"):
            with_needs(recipe_of("mae", place, init=str(tmp_path / "odd"), init_partial=partial))


def test_fetch__checkpoints_of_other_libraries_are_imported_on_the_way(place: Path, tmp_path: Path):
    from safetensors.torch import save_file

    from mimray.trainers.convert import export_timm

    donor = donate("mae", place, "mae-donor")
    export_timm(place / "mae-donor" / "bundle", tmp_path / "timm")
    recipe = with_needs(recipe_of("simmim", place, init=str(tmp_path / "timm")), fetch_weights)
    run = RunDir(str(tmp_path / "run"))
    keep_needs(recipe, run, fetch_weights)
    method = build_method(recipe)

    load_needs(method, run)

    weight = "blocks.1.mlp.fc1.weight"
    assert torch.equal(method.encoder.state_dict()[weight], donor[f"encoder.{weight}"])
    assert len(recipe.method.init_sha256) == 64
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    save_file({"a": torch.ones(2)}, tmp_path / "odd.safetensors")
    (tmp_path / "notes.txt").write_text("hello")
    # Where there are weights, an option of the import may say what they are.
    for name, message, options_help in (
        ("whole.pth", "is a pickle that is not plain tensors", False),
        ("cut.safetensors", "cannot be read", False),
        ("notes.txt", "is no checkpoint: neither safetensors nor a file of torch.save", False),
        ("pictures", "is no model's folder: it needs config.json", False),
        ("odd.safetensors", "these are weights of neither a vit nor a swin", True),
    ):
        file = (place if name == "pictures" else tmp_path) / name
        with pytest.raises(BundleError, match=message) as refused:
            fetch_weights(str(file))
        assert ("takes further options" in str(refused.value)) == options_help, name
    with pytest.raises(BundleError, match=r"timm cannot give 'no_such_model'.*cache\)$"):
        fetch_weights("timm:no_such_model")
    with pytest.raises(MissingBundleError, match="no bundle at /nowhere, no checkpoint"):
        fetch_weights("/nowhere")


def test_averages__begin_with_the_same_weights(place: Path):
    class Averaged(Method):
        def __init__(self, recipe: Recipe) -> None:
            super().__init__(recipe)
            inner = build_method(recipe)
            self.encoder, self.head = inner.encoder, nn.Linear(3, 2)
            followed = {"encoder": self.encoder, "head": self.head}
            self.averages = MovingAverages(followed, Schedule(start=0.9))

        def forward(self, images: Any, mask: Any = None) -> Any:
            raise NotImplementedError

    method = Averaged(recipe_of("mae", place))
    encoder = {k: v + 1 for k, v in method.encoder.state_dict().items()}

    method.begin_with(encoder, {"head.weight": torch.full((2, 3), 4.0)})

    state = method.state_dict()
    assert torch.equal(state["averages.head.weight"], torch.full((2, 3), 4.0))
    for key, value in encoder.items():
        assert torch.equal(state[f"averages.encoder.{key}"], value), key


def test_advice__a_rate_that_forgets_the_weights(place: Path):
    tree = recipe_of("mae", place, init=str(place / "mae")).model_dump()
    tree["optim"] |= {"base_lr": 0.06, "warmup_steps": 1}

    warned = "\n".join(advice(plan_of(with_needs(parse_recipe(tree)), place)))

    assert "begins with trained weights" in warned
    fresh = parse_recipe({**tree, "method": {**tree["method"], "init": ""}})
    assert "begins with trained weights" not in "\n".join(advice(plan_of(fresh, place)))


@pytest.fixture(scope="module")
def whole(place: Path, process_group: None) -> Callable[[str], dict[str, Any]]:
    """Uninterrupted runs without ZeRO, by case."""
    known: dict[str, dict[str, Any]] = {}

    def of(case: str) -> dict[str, Any]:
        if case not in known:
            known[case] = learn(case, place, f"{case}-whole")
        return known[case]

    return of


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow),
                                   pytest.param(3, marks=pytest.mark.slow)])  # fmt: skip
def test_zero__learns_the_same_from_weights(
    stage: int, case: str, place: Path, whole: Callable[[str], dict[str, Any]]
):
    assert_same(learn(case, place, f"{case}-zero{stage}", stage=stage), whole(case))


@pytest.mark.parametrize("case", CASES)
def test_resume__a_killed_run_needs_nothing_but_its_own_directory(
    case: str, place: Path, whole: Callable[[str], dict[str, Any]]
):
    wanted, given = whole(case), place / case
    with pytest.raises(KeyboardInterrupt):
        learn(case, place, f"{case}-cut", cut_at=3)
    given.rename(place / f"{case}-away")
    try:
        found = learn(case, place, f"{case}-cut")
    finally:
        (place / f"{case}-away").rename(given)

    assert [row["loss"] for row in found["rows"]] == [row["loss"] for row in wanted["rows"]]
    for name, value in wanted["state"].items():
        assert torch.equal(found["state"][name], value), name


def work(place: Path, rank: int, cases: list[str]) -> None:
    """The program of each subprocess."""
    os.environ["LOCAL_RANK"] = str(rank)
    prepare_process(torch.device("cpu"))
    dist.init_process_group("gloo", init_method=f"file://{place}/meeting", rank=rank, world_size=2)
    found = {case: learn(case, place, f"{case}-two", stage=1) for case in cases}
    torch.save(found, place / f"found.{rank}")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort an orderly end


@pytest.fixture(scope="module")
def on_two_ranks(place: Path, run_ranks: Callable[..., None]) -> dict[str, Any]:
    run_ranks(__file__, place, json.dumps(list(CASES)))
    found: dict[str, Any] = torch.load(place / "found.0")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_workers__change_nothing(
    case: str, on_two_ranks: dict[str, Any], whole: Callable[[str], dict[str, Any]]
):
    assert_same(on_two_ranks[case], whole(case))


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
