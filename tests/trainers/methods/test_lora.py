"""Low-rank adapters: nothing at the start, the same however it is sharded, plain at the end.

Two ranks need processes of their own; this file is also what they run.
"""

from __future__ import annotations

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
from torch import Tensor

from mimray.trainers import load_bundle, load_method
from mimray.trainers.bundles import BundleCard, read_card, save_bundle
from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.config.run import Plan, Recipe, differences, essential, parse_recipe, resolve
from mimray.trainers.config.schedule import Schedule
from mimray.trainers.cost import estimate
from mimray.trainers.cost.step import shape_of
from mimray.trainers.data.selection import open_training, with_classes
from mimray.trainers.engine import checkpoints
from mimray.trainers.engine.average import chosen_weights, with_average
from mimray.trainers.engine.checkpoints import Identity
from mimray.trainers.engine.deepspeed import (
    Engine,
    fixed_weights,
    follow,
    full_state,
    initialize,
    prepare_process,
)
from mimray.trainers.engine.export import read_checkpoint, write_bundle
from mimray.trainers.engine.loop import Trained, train
from mimray.trainers.engine.optim import check_trained
from mimray.trainers.errors import ConfigError
from mimray.trainers.methods.base import Method
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.methods.lora import adapt, merged
from mimray.trainers.methods.needs import keep_needs, with_needs
from mimray.trainers.models import build_encoder
from mimray.trainers.models.averages import MovingAverages
from mimray.trainers.storage import RunDir
from mimray.trainers.types import DatasetFacts

BATCH, STEPS = 4, 2
VIT = {"name": "vit", "width": 16, "depth": 2, "num_heads": 2, "patch_size": 4}
SWIN = {"name": "swin", "width": 8, "depths": [2, 1], "num_heads": [1, 2], "patch_size": 2,
        "window_size": 2}  # fmt: skip
BLOCKS = {"min_block_patches": 2, "mask_ratio": 0.5}
AUTO = {"decoder_widths": [12, 8, 8], "decoder_blocks": 1}
CASES: dict[str, dict[str, Any]] = {
    "mae": {"encoder": VIT, "method": {"name": "mae", "decoder_width": 16, "decoder_depth": 1,
                                       "decoder_num_heads": 2}},
    "simmim": {"encoder": VIT | {"positions": "learned"}, "method": {"name": "simmim",
                                                                     "mask_unit_px": 8}},
    "simmim-swin": {"encoder": SWIN, "method": {"name": "simmim", "mask_unit_px": 4}},
    "maskfeat": {"encoder": VIT, "method": {"name": "maskfeat", "hog_cell_px": 4, **BLOCKS}},
    "beit": {"encoder": VIT | {"positions": "none", "rel_pos_bias": "shared", "layer_scale": 0.1,
                               "init": "beit"},
             "method": {"name": "beit", "vocab_size": 16, "tokenizer_image_size": 16, **BLOCKS}},
    # DINOv3's blocks, whose projections have a forward pass of their own.
    "simmim-rope": {"encoder": VIT | {"positions": "none", "rope": "dinov3", "key_bias": False,
                                      "mlp": "swiglu"},
                    "method": {"name": "simmim", "mask_unit_px": 8}},
    "ae": {"encoder": VIT, "method": {"name": "ae", "latent_dim": 4, **AUTO}},
    "vae": {"encoder": VIT, "method": {"name": "vae", "latent_dim": 4, **AUTO}},
    "dvae": {"encoder": VIT, "method": {"name": "dvae", "codebook_size": 16, "code_dim": 4,
                                        "min_usage": 0, **AUTO}},
    "finetune": {"encoder": VIT, "method": {"name": "finetune", "num_classes": 3}},
}  # fmt: skip


class Codes:
    """A tokenizer whose code is the brightness of the place."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def to(self, device: torch.device) -> Codes:
        return self

    def codes(self, images: Tensor) -> Tensor:
        bright = torch.nn.functional.adaptive_avg_pool2d(images.mean(1), self.recipe.grid)
        return (bright.sigmoid() * 16).long().clamp(0, 15)

    def decode_codes(self, codes: Tensor) -> Tensor:
        raise NotImplementedError


def plan_of(case: str = "mae", *, stage: int = 0, world_size: int = 1, **lora: Any) -> Plan:
    tree = CASES[case] | {
        "data": {"image_size": 16},
        # Adam makes whole steps of the rounding of gradients that are zero, as of keys' biases.
        "optim": {"batch_size": BATCH, "steps": 10, "eps": 1e-5},
        "engine": {"zero_stage": stage, "precision": "fp32"},
        "lora": {"rank": 2, "alpha": 4, **lora},
    }
    return resolve(parse_recipe(tree), DatasetFacts("here", 100, "f1"), world_size)


def adapted(plan: Plan, seed: int = 0) -> Method:
    torch.manual_seed(seed)
    method = with_biases(build_method(plan.recipe)).train()
    if plan.recipe.method.name == "beit":
        method.attach(Codes(plan.recipe))
    adapt(method)
    return method


def with_biases(method: Method) -> Method:
    """A method whose encoder's biases are not zero, as those of weights to begin with."""
    rng = torch.Generator().manual_seed(3)
    for name, parameter in method.encoder.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.1, generator=rng)
    return method


def moved(method: Method, seed: int = 1) -> Method:
    """A method whose adapters have learnt something."""
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in method.named_parameters():
        if name.endswith("lora_up"):
            parameter.data.normal_(std=0.02, generator=rng)
    return method


def update(engine: Engine, plan: Plan, step: int) -> float:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    share = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    recipe, rng = plan.recipe, torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 3, 16, 16, generator=rng)[share]
    drawn = [engine.module.draw_mask(recipe, np.random.default_rng(i)) for i in range(BATCH)]
    mask = None if drawn[0] is None else torch.from_numpy(np.stack(drawn))[share]
    labels = {"labels": torch.arange(BATCH)[share] % 3} if recipe.method.learns_classes else {}
    for group in engine.optimizer.param_groups:
        group["lr"] = 1e-3
    torch.manual_seed(step + 100 * rank)
    engine.module.at_step(step, plan.steps)
    loss = engine(images=images, mask=mask, **labels).loss
    engine.backward(loss)
    engine.step()
    engine.module.after_step(step + 1)
    total = loss.detach().clone()
    dist.all_reduce(total)
    return float(total) / world_size


def learn(case: str, stage: int) -> dict[str, Any]:
    """Losses of a few steps, and the weights before and after them."""
    plan = plan_of(case, stage=stage, world_size=dist.get_world_size())
    method = adapted(plan)
    fixed = fixed_weights(method)
    engine = initialize(method, plan, "fp32")
    before = full_state(engine, fixed)
    losses = [update(engine, plan, step) for step in range(STEPS)]
    return {"losses": losses, "before": before, "after": full_state(engine, fixed)}


@pytest.mark.parametrize("case", CASES)
def test_start__is_that_without_adapters_bit_for_bit(case: str):
    plan = plan_of(case)
    torch.manual_seed(0)
    plain = with_biases(build_method(plan.recipe)).eval()
    method = adapted(plan).eval()
    images = torch.randn(2, 3, 16, 16)

    with torch.no_grad():  # attention takes another kernel where a bias keeps gradients
        wanted, maps = plain.encoder.forward_intermediates(images, (0, 1))
        found, found_maps = method.encoder.forward_intermediates(images, (0, 1))

    assert torch.equal(found.tokens, wanted.tokens)
    assert torch.equal(found.prefix, wanted.prefix)
    assert all(torch.equal(a, b) for a, b in zip(found_maps, maps, strict=True))
    for name, value in plain.state_dict().items():
        assert torch.equal(method.state_dict()[name], value), name


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case in ("mae", "simmim-swin") else pytest.mark.slow)
        for case in CASES
    ],
)
def test_training__moves_adapters_and_the_rest_and_no_base_weight_at_any_stage(case: str):
    results = {stage: learn(case, stage) for stage in (0, 1, 2, 3)}
    plain = results[0]

    for stage, found in results.items():
        before, after = found["before"], found["after"]
        changed = {n for n in after if not torch.equal(after[n], before[n])}
        adapters = {n for n in after if n.endswith("lora_up")}
        assert len(adapters) == (6 if "swin" in case else 4)
        assert adapters <= changed
        assert {"encoder.norm.weight", "encoder.norm.bias"} <= changed
        for name in changed:
            assert (
                not name.startswith("encoder.")
                or "lora_" in name
                or name in ("encoder.norm.weight", "encoder.norm.bias")
            ), name
        assert any(not name.startswith("encoder.") for name in changed)
        np.testing.assert_allclose(found["losses"], plain["losses"], rtol=1e-5)
        for name, value in plain["after"].items():
            torch.testing.assert_close(
                after[name], value, rtol=1e-4, atol=1e-4, msg=f"{stage} {name}"
            )


@pytest.mark.parametrize("case", CASES)
def test_merged__has_the_features_of_base_and_adapters(case: str):
    plan = plan_of(case, targets=["attn.*", "mlp.fc?"])
    method = moved(adapted(plan)).eval()
    plain = build_method(plan.recipe).eval()
    images = torch.randn(2, 3, 16, 16)
    start = method.encoder(images).tokens - build_method(plan.recipe).encoder(images).tokens

    plain.load_state_dict(merged(method.state_dict(), plan.recipe))

    assert start.abs().max() > 1e-3
    wanted, found = method.encoder(images), plain.encoder(images)
    torch.testing.assert_close(found.tokens, wanted.tokens, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.pooled, wanted.pooled, rtol=1e-6, atol=1e-6)


def test_merged__of_no_adapters_is_the_state():
    recipe = plan_of().recipe.model_copy(update={"lora": None})
    state = build_method(recipe).state_dict()

    assert all(value is state[name] for name, value in merged(state, recipe).items())


def test_merged__formula():
    plan = plan_of(targets=["blocks.1.attn.qkv"])
    state = moved(adapted(plan)).state_dict()
    name = "encoder.blocks.1.attn.qkv"

    found = merged(state, plan.recipe)

    change = 4 / 2 * state[f"{name}.lora_up"] @ state[f"{name}.lora_down"]
    torch.testing.assert_close(found[f"{name}.weight"], state[f"{name}.weight"] + change)
    assert [n for n in state if n not in found] == [f"{name}.lora_down", f"{name}.lora_up"]
    assert torch.linalg.matrix_rank(found[f"{name}.weight"] - state[f"{name}.weight"]) == 2


class Following(Method):
    """A teacher that follows, as a method of another distribution has it."""

    result = "averages.encoder"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.encoder = build_encoder(recipe.encoder, recipe.data.image_size)
        self.averages = MovingAverages({"encoder": self.encoder}, Schedule(start=0.5))

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Any:
        raise NotImplementedError


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("stage", [0, 3])
def test_averages__follow_the_adapters_and_start_from_the_same_weights(
    stage: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mimray.trainers.methods.lora.build_method", Following)
    plan = plan_of(stage=stage)
    torch.manual_seed(0)
    method = Following(plan.recipe)
    # As weights to begin with would: they reach the encoder after the averages were made.
    method.encoder.get_parameter("norm.weight").data.fill_(2.0)
    adapt(method)
    fixed, images = fixed_weights(method), torch.randn(2, 3, 16, 16)
    moved(method)
    engine = initialize(method, plan, "fp32")

    assert method.averages is not None
    follow(engine, method.averages, 0.5)

    state = full_state(engine, fixed)
    up = "encoder.blocks.0.attn.qkv.lora_up"
    torch.testing.assert_close(state[f"averages.{up}"], state[up] / 2)
    for name in ("norm.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"):
        assert torch.equal(state[f"averages.encoder.{name}"], state[f"encoder.{name}"]), name
    plain = Following(plan.recipe)
    plain.load_state_dict(merged(state, plan.recipe))
    assert method.averages is not None
    torch.testing.assert_close(
        plain.averages("encoder", images).tokens,
        method.averages("encoder", images).tokens,
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.usefixtures("process_group")
def test_ema__averages_adapters_which_are_merged_afterwards():
    plan = plan_of("finetune")
    recipe = plan.recipe
    optim = recipe.optim.model_copy(update={"ema": Schedule(start=0.5)})
    plan = plan.model_copy(update={"recipe": recipe.model_copy(update={"optim": optim})})
    method = with_average(adapted(plan))
    fixed, up = fixed_weights(method), "encoder.blocks.0.attn.qkv.lora_up"
    moved(method)
    engine = initialize(method, plan, "fp32")

    assert method.ema is not None
    follow(engine, method.ema, 0.5)

    averaged = chosen_weights(full_state(engine, fixed), "average")
    torch.testing.assert_close(averaged[up], method.get_parameter(up) / 2)
    twin, plain = adapted(plan), build_method(plan.recipe)
    twin.load_state_dict(averaged)
    plain.load_state_dict(merged(averaged, plan.recipe))
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(
        plain.eval().encoder(images).tokens, twin.eval().encoder(images).tokens,
        rtol=1e-6, atol=1e-6,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"targets": ["attn.k"]}, r"lora.targets: attn.k is no linear layer of encoder vit "
         r"\(there are blocks.\*.attn.qkv, blocks.\*.attn.proj, blocks.\*.mlp.fc1, "),
        ({"targets": ["attn.qkv", "blocks.2.*"]}, "lora.targets: blocks.2.* is no linear layer"),
        ({"trained": ["pos_embed"]}, "lora.trained: pos_embed is no trained parameter of encoder"),
        ({"rank": 16}, "lora.rank 16 is not below the full rank of blocks.0.attn.qkv, which maps "
         "16 numbers to 48"),
    ],
)  # fmt: skip
def test_refused__what_the_encoder_does_not_have(lora: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        check_trained(plan_of(**lora))


def test_refused__an_encoder_without_linear_layers():
    recipe = load_recipe("ae-tiny", ["lora.rank=4"])

    with pytest.raises(ConfigError, match="of which encoder conv has none"):
        check_trained(resolve(recipe, DatasetFacts("here", 1000, "f1"), 1))


@pytest.mark.parametrize("name", ["mae-tiny", "finetune-tiny"])
def test_refused__adapters_of_weights_that_nobody_trained(name: str):
    with pytest.raises(ConfigError, match="names none to begin with"):
        with_needs(load_recipe(name, ["lora.rank=4"]))


def test_recipe__a_null_section_takes_keys_and_is_off_again():
    assert load_recipe("mae-tiny", ["lora=null", "lora.rank=4"]).lora.scale == 4.0
    assert load_recipe("mae-tiny", ["lora.rank=4", "lora=null"]).lora is None


def test_plan__without_adapters_is_that_of_earlier_versions():
    recipe = load_recipe("mae-tiny", ["optim.batch_size=8"])
    plain = resolve(recipe, DatasetFacts("here", 100, "f1"), 1)
    other = resolve(
        load_recipe("mae-tiny", ["optim.batch_size=8", "lora.rank=4"]),
        DatasetFacts("here", 100, "f1"),
        1,
    )

    assert plain.hash == "48c707a06f26976a"
    assert "lora" not in essential(recipe)
    assert "unfreeze_every_steps" not in essential(recipe)["optim"]
    assert plain.hash != other.hash
    assert [line.split(":")[0] for line in differences(plain, other)] == [
        "lora.alpha", "lora.rank", "lora.targets", "lora.trained",
    ]  # fmt: skip


def test_cost__counts_adapters_alone_as_trained():
    facts = DatasetFacts("here", 10_000, "f1")
    sets = ["optim.batch_size=16", "method.num_classes=10"]
    plain = estimate(resolve(load_recipe("finetune-vit-b", sets, 20), facts, 1), "bf16")
    plan = resolve(load_recipe("finetune-vit-b", [*sets, "lora.rank=8"], 20), facts, 1)
    cost = estimate(plan, "bf16")

    # 12 blocks of qkv (768 to 2304) and proj (768 to 768), the last norm, the head.
    adapters = 12 * 8 * ((768 + 2304) + (768 + 768))
    assert cost.trained == adapters + 2 * 768 + (768 + 1) * 10
    assert cost.parameters["encoder"] == plain.parameters["encoder"] + adapters
    memory = cost.memory[0, False]
    assert memory.gradients == 4 * cost.trained
    assert memory.optimizer == 8 * cost.trained
    # Two products of 2 x adapters FLOPs a token more; base weights have no gradient to compute.
    tokens = cost.plain.encoder_tokens
    extra = cost.plain.forward_flops["encoder"] - plain.plain.forward_flops["encoder"]
    assert extra == pytest.approx(2 * adapters * tokens)
    assert cost.plain.training_flops < 0.75 * plain.plain.training_flops
    method = shape_of(plan.recipe, torch.float32, {})
    assert cost.trained == sum(p.numel() for p in method.parameters() if p.requires_grad)


# Whole runs


class Observer:
    """Ends the run with an error at a step, as a lost worker would."""

    def __init__(self, cut_at: int | None = None) -> None:
        self.cut_at = cut_at
        self.began: list[int] = []

    def resumed(self, step: int) -> None:
        self.began.append(step)

    def metrics(self, row: dict[str, Any]) -> None:
        if row["step"] == self.cut_at:
            raise KeyboardInterrupt

    def pictures(self, step: int, panels: list[Any]) -> None: ...


def finetuning(folder: Path, stage: int, precision: str = "fp32") -> Plan:
    rng = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (folder / "data" / name).mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "data" / name / f"{number}.png")
    config = parse_recipe(CASES["finetune"] | {"optim": {"steps": 1}}).encoder
    card = BundleCard(
        name="it", encoder=config, image_size=(16, 16), channels=3, mean=(0.5,) * 3, std=(0.2,) * 3
    )
    torch.manual_seed(5)
    save_bundle(folder / "bundle", card, build_encoder(config, (16, 16)).state_dict())
    recipe = parse_recipe(
        {
            "encoder": VIT | {"positions": "learned", "drop_path": 0.2},
            "method": {"name": "finetune", "bundle": str(folder / "bundle")},
            "data": {"image_size": 16, "num_workers": 0},
            "optim": {"batch_size": 4, "steps": 6, "base_lr": 0.5, "layer_decay": 0.75},
            "engine": {"zero_stage": stage, "precision": precision, "micro_batch_size": 2},
            "checkpoint": {"every_steps": 2}, "logging": {"every_steps": 1},
            "lora": {"rank": 2, "targets": ["qkv", "mlp.*"]},
        }
    )  # fmt: skip
    source = open_training(str(folder / "data"), recipe)
    return resolve(with_classes(with_needs(recipe), source), source.facts, world_size=1)


def run_of(plan: Plan, place: Path, observer: Observer) -> Trained:
    run = RunDir(str(place))
    run.create()
    keep_needs(plan.recipe, run)
    source = open_training(plan.data.uri, plan.recipe)
    return train(plan, run, source, device=torch.device("cpu"), observer=observer)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (1, "fp32"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((0, "fp32"), (2, "bf16_weights"), (3, "fp32"))
        ),
    ],
)
def test_finetune__goes_on_to_the_bit_and_leaves_an_ordinary_bundle(
    stage: int, precision: str, tmp_path: Path
):
    plan, cut = finetuning(tmp_path, stage, precision), Observer(cut_at=5)

    wanted = run_of(plan, tmp_path / "whole", Observer())
    with pytest.raises(KeyboardInterrupt):
        run_of(plan, tmp_path / "cut", cut)
    cut.cut_at = None
    found = run_of(plan, tmp_path / "cut", cut)

    assert cut.began == [0, 4]
    assert found.last["loss"] == wanted.last["loss"]
    assert all(torch.equal(found.state[name], wanted.state[name]) for name in wanted.state)

    # The weights that were adapted are those of the bundle, unrounded.
    base = load_bundle(tmp_path / "bundle").encoder.state_dict()
    for name in ("blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.bias", "cls_token"):
        assert torch.equal(found.state[f"encoder.{name}"], base[name]), name

    # What is read from the last checkpoint, without a run, is what the run ended with.
    run = RunDir(str(tmp_path / "cut"))
    checkpoint = checkpoints.find(run)[0]
    read = read_checkpoint(run, tmp_path / "cut/checkpoints" / checkpoint.name, checkpoint, plan)
    assert read.keys() == found.state.keys()
    assert all(torch.equal(read[name], value) for name, value in found.state.items())

    # The bundle knows nothing of adapters but for a note.
    write_bundle(run, plan, read, step=6, name="it", command="test")
    card = read_card(tmp_path / "cut")
    assert card.adapters == {
        "rank": 2,
        "alpha": 16.0,
        "layers": [
            f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.qkv", "mlp.fc1", "mlp.fc2")
        ],
    }
    encoder, method = load_bundle(tmp_path / "cut"), load_method(tmp_path / "cut")
    assert not any("lora" in name for name in method.state_dict())
    adapting = build_method(plan.recipe)
    adapt(adapting)
    adapting.load_state_dict(found.state)
    images = torch.randn(2, 3, 16, 16)
    features = adapting.eval().encoder(images)
    torch.testing.assert_close(encoder(images).tokens, features.tokens, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(method.logits(images), adapting.logits(images), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("process_group")
def test_pretrain__from_weights_with_an_average_leaves_the_merged_average(tmp_path: Path):
    data = finetuning(tmp_path, 1).data
    tree = CASES["mae"] | {
        "method": CASES["mae"]["method"] | {"init": str(tmp_path / "bundle")},
        "data": {"image_size": 16, "num_workers": 0},
        "optim": {"batch_size": 4, "steps": 4, "base_lr": 0.5, "ema": 0.5,
                  "unfreeze_every_steps": 1},
        "engine": {"zero_stage": 1, "precision": "fp32"},
        "lora": {"rank": 2},
    }  # fmt: skip
    plan = resolve(with_needs(parse_recipe(tree)), data, world_size=1)

    trained = run_of(plan, tmp_path / "run", Observer())
    run = RunDir(str(tmp_path / "run"))
    card = write_bundle(run, plan, trained.state, step=4, name="it", command="test")

    base, found = load_bundle(tmp_path / "bundle"), load_bundle(tmp_path / "run")
    for name, value in base.encoder.state_dict().items():
        changed = name.startswith("norm.") or ".attn." in name and name.endswith("weight")
        assert torch.equal(found.encoder.state_dict()[name], value) is not changed, name
    adapting = build_method(plan.recipe)
    adapt(adapting)
    adapting.load_state_dict(chosen_weights(trained.state, "average"))
    images = torch.randn(2, 3, 16, 16)
    wanted = adapting.eval().encoder(images).tokens
    torch.testing.assert_close(found(images).tokens, wanted, rtol=1e-6, atol=1e-6)
    assert card.adapters["layers"] == [
        f"blocks.{i}.attn.{name}" for i in (0, 1) for name in ("qkv", "proj")
    ]


# Two ranks


def work(folder: Path, rank: str) -> None:
    """The work of the two processes: two updates, a checkpoint, a third update, by stage."""
    os.environ["LOCAL_RANK"] = rank
    prepare_process(torch.device("cpu"))
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=int(rank), world_size=2
    )
    for stage in (0, 1, 2, 3):
        plan = plan_of(stage=stage, world_size=2)
        method = adapted(plan)
        fixed = fixed_weights(method)
        engine = initialize(method, plan, "fp32")
        for step in range(2):
            update(engine, plan, step)
        run = RunDir(f"{folder}/stage{stage}")
        checkpoints.save(run, engine, Identity("hash", stage, "fp32"), step=2, samples=8, keep=1)
        update(engine, plan, 2)
        torch.save(full_state(engine, fixed), f"{folder}/stage{stage}.{rank}.pt")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort an orderly end


@pytest.fixture(scope="module")
def trained_by_two(
    tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., None]
) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_ranks(__file__, folder)
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume__on_one_worker_goes_on_from_two(stage: int, trained_by_two: Path):
    plan = plan_of(stage=stage)
    # The base weights are fixed, and follow from what the run begins with.
    method = adapted(plan)
    fixed = fixed_weights(method)
    moved(method, seed=7)
    engine = initialize(method, plan, "fp32")

    loaded = checkpoints.load_newest(
        RunDir(str(trained_by_two / f"stage{stage}")), engine, Identity("hash", stage, "fp32")
    )
    update(engine, plan, 2)

    assert loaded is not None
    assert loaded.world_size == 2
    first, second = (torch.load(trained_by_two / f"stage{stage}.{rank}.pt") for rank in (0, 1))
    for name, value in full_state(engine, fixed).items():
        assert torch.equal(first[name], second[name]), name
        np.testing.assert_allclose(value, first[name], rtol=1e-4, atol=1e-5, err_msg=name)


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2])
