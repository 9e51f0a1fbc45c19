"""Whole runs with adapters: killed, on other workers, exported.

Two ranks need processes of their own; this file is also what they run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mimray.trainers import load_bundle, load_method
from mimray.trainers.bundles import BundleCard, read_card, save_bundle
from mimray.trainers.config.run import Plan, parse_recipe, resolve
from mimray.trainers.data.selection import open_training, with_classes
from mimray.trainers.engine import checkpoints
from mimray.trainers.engine.average import chosen_weights
from mimray.trainers.engine.checkpoints import Identity
from mimray.trainers.engine.deepspeed import (
    fixed_weights,
    full_state,
    initialize,
)
from mimray.trainers.engine.export import read_checkpoint, write_bundle
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.methods.lora import adapt
from mimray.trainers.methods.needs import with_needs
from mimray.trainers.models import build_encoder
from mimray.trainers.storage import RunDir
from tests.trainers.methods.cases import METHODS, VIT
from tests.trainers.methods.lora_cases import adapted, moved, plan_of, update
from tests.trainers.runs import Observer, group_of_two, run_of, write_noise

# Keys of the methods that name the bundle.
KEYS = {"finetune": ("bundle",), "mae": ("init",), "distill": ("init", "teacher")}


def plan_from_weights(
    folder: Path, case: str, stage: int = 1, precision: str = "fp32", **optim: Any
) -> Plan:
    """A short run that adapts a bundle of random weights, on pictures of noise."""
    data = write_noise(folder / "data", 4, ("ant", "bee"))
    card = BundleCard.model_validate(
        {"name": "it", "encoder": VIT, "image_size": [16, 16], "channels": 3,
         "mean": [0.5] * 3, "std": [0.2] * 3}
    )  # fmt: skip
    torch.manual_seed(5)
    save_bundle(folder / "bundle", card, build_encoder(card.encoder, (16, 16)).state_dict())
    named = {key: str(folder / "bundle") for key in KEYS[case]}
    learnt = {"positions": "learned"} if case == "finetune" else {}
    recipe = parse_recipe(
        {
            "encoder": VIT | {"drop_path": 0.2} | learnt,
            "method": METHODS[case] | named,
            "data": {"image_size": 16, "num_workers": 0},
            "optim": {"batch_size": 4, "steps": 6, "base_lr": 0.5, **optim},
            "engine": {"zero_stage": stage, "precision": precision, "micro_batch_size": 2},
            "checkpoint": {"every_steps": 2}, "logging": {"every_steps": 1},
            "lora": {"rank": 2, "targets": ["qkv", "mlp.*"]},
        }
    )  # fmt: skip
    source = open_training(str(data), recipe)
    return resolve(with_classes(with_needs(recipe), source), source.facts, world_size=1)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("case", "stage", "precision"),
    [
        ("finetune", 1, "fp32"),
        ("mae", 1, "fp32"),
        ("distill", 3, "fp32"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("finetune", 0, "fp32"), ("finetune", 2, "bf16_weights"), ("finetune", 3, "fp32"),
                ("mae", 3, "fp32"), ("distill", 1, "fp32"), ("distill", 2, "bf16_weights"),
            )
        ),
    ],
)  # fmt: skip
def test_run__goes_on_to_the_bit_and_leaves_an_ordinary_bundle(
    case: str, stage: int, precision: str, tmp_path: Path
):
    decay = {"layer_decay": 0.75} if case == "finetune" else {}
    plan = plan_from_weights(tmp_path, case, stage, precision, **decay)
    cut = Observer(cut_at=5)

    wanted = run_of(plan, tmp_path / "whole")
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
    for name, value in method.state_dict().items():
        assert name.startswith("encoder.") or torch.equal(value, found.state[name]), name
    if case == "finetune":
        logits = adapting.logits(images)
        torch.testing.assert_close(method.logits(images), logits, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("process_group")
def test_pretrain__from_weights_with_an_average_leaves_the_merged_average(tmp_path: Path):
    plan = plan_from_weights(tmp_path, "mae", ema=0.5, unfreeze_every_steps=1)
    trained = run_of(plan, tmp_path / "run")
    run = RunDir(str(tmp_path / "run"))
    card = write_bundle(run, plan, trained.state, step=6, name="it", command="test")

    base, found = load_bundle(tmp_path / "bundle"), load_bundle(tmp_path / "run")
    for name, value in base.encoder.state_dict().items():
        adapted_layer = ".attn.qkv.weight" in name or ".mlp." in name and name.endswith("weight")
        changed = name.startswith("norm.") or adapted_layer
        assert torch.equal(found.encoder.state_dict()[name], value) is not changed, name
    adapting = build_method(plan.recipe)
    adapt(adapting)
    adapting.load_state_dict(chosen_weights(trained.state, "average"))
    images = torch.randn(2, 3, 16, 16)
    wanted = adapting.eval().encoder(images).tokens
    torch.testing.assert_close(found(images).tokens, wanted, rtol=1e-6, atol=1e-6)
    assert card.weights == "average"


def work(folder: Path, rank: int) -> None:
    """The work of the two processes: two updates, a checkpoint, a third update, by stage."""
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
    with group_of_two(Path(sys.argv[1]), int(sys.argv[2])):
        work(Path(sys.argv[1]), int(sys.argv[2]))
