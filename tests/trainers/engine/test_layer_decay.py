"""Layer-wise decay: layers and scales against the published rules, in real DeepSpeed steps.

The last test needs two processes; this file is also what they run.
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

from mimray.trainers.config.run import Plan, parse_recipe, resolve
from mimray.trainers.engine.checkpoints import Identity, load_newest, save
from mimray.trainers.engine.deepspeed import (
    fixed_weights,
    full_state,
    initialize,
    prepare_process,
)
from mimray.trainers.engine.optim import build_optimizer, parameter_groups
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.models import build_encoder
from mimray.trainers.storage import RunDir
from mimray.trainers.types import DatasetFacts

DECAY, BATCH = 0.5, 4
VIT = {"name": "vit", "width": 16, "depth": 2, "num_heads": 2, "patch_size": 8,
       "positions": "learned"}  # fmt: skip
SWIN = {"name": "swin", "width": 8, "depths": [2, 3], "num_heads": [1, 2], "window_size": 2}
CONV = {"name": "conv", "widths": [16, 32]}


def plan_of(
    encoder: dict[str, Any] = VIT, *, stage: int = 0, world_size: int = 1, **optim: Any
) -> Plan:
    recipe = parse_recipe(
        {
            "encoder": encoder,
            "method": {"name": "finetune", "num_classes": 3},
            "data": {"image_size": 16},
            "optim": {"batch_size": BATCH, "steps": 10, "layer_decay": DECAY, **optim},
            "engine": {"zero_stage": stage, "precision": "fp32"},
        }
    )
    return resolve(recipe, DatasetFacts("here", 100, "f1"), world_size)


def layers_of(encoder: dict[str, Any]) -> dict[str, int]:
    config = plan_of(encoder).recipe.encoder
    built = build_encoder(config, (16, 16))
    return {name: built.decay_layer(name) for name, _ in built.named_parameters()}


def test_vit__layers_are_those_of_beit():
    # Bao et al. 2022, official `get_num_layer_for_vit`, of 2 blocks and so 4 layers.
    def published(name: str) -> int:
        if name in ("cls_token", "mask_token", "pos_embed") or name.startswith("patch_embed"):
            return 0
        if name.startswith("blocks"):
            return int(name.split(".")[1]) + 1
        return 4 - 1

    found = layers_of(VIT | {"rel_pos_bias": "shared"})

    assert found == {name: published(name) for name in found}
    assert set(found.values()) == {0, 1, 2, 3}


def test_swin__layers_are_those_of_simmim():
    # Official `get_swin_layer`, whose merge ends a stage: `layers.0.downsample` there is
    # `layers.1.downsample` here.
    depths = SWIN["depths"]

    def published(name: str) -> int:
        if name.startswith("patch_embed"):
            return 0
        if not name.startswith("layers"):
            return sum(depths) + 2 - 1
        stage, kind, *inner = name.split(".")[1:]
        if kind == "downsample":
            return sum(depths[: int(stage) - 1 + 1])
        return sum(depths[: int(stage)]) + int(inner[0]) + 1

    found = layers_of(SWIN)

    assert found == {name: published(name) for name in found}
    assert set(found.values()) == set(range(7))


def test_conv__a_layer_is_a_stage():
    found = layers_of(CONV)

    assert {layer for name, layer in found.items() if name.startswith("stages.1")} == {2}
    assert set(found.values()) == {0, 1, 2, 3}


def test_groups__scales_of_beit_base():
    recipe = parse_recipe(
        {
            "encoder": {"name": "vit", "width": 8, "depth": 12, "num_heads": 2, "patch_size": 8},
            "method": {"name": "finetune", "num_classes": 3},
            "data": {"image_size": 16},
            "optim": {"steps": 10, "layer_decay": 0.65},
        }
    )
    method = build_method(recipe)
    names = {id(p): n for n, p in method.named_parameters()}

    optim = recipe.optim.model_copy(update={"no_decay": ("cls_token",)})
    groups = parameter_groups(method, optim)

    # 13 layers below the head: 0.65 ** 13 for the patches, 0.65 for the last block.
    assert sorted({g["lr_scale"] for g in groups}) == pytest.approx(
        [0.65**n for n in range(13, -1, -1)]
    )
    by_name = {names[id(p)]: g for g in groups for p in g["params"]}
    trained = {n for n, p in method.named_parameters() if p.requires_grad}
    assert by_name.keys() == trained
    for name, scale, decay in (
        ("encoder.cls_token", 0.65**13, 0.0),
        ("encoder.patch_embed.proj.weight", 0.65**13, 0.05),
        ("encoder.blocks.0.attn.qkv.weight", 0.65**12, 0.05),
        ("encoder.blocks.11.mlp.fc2.bias", 0.65, 0.0),
        ("encoder.norm.weight", 1.0, 0.0),
        ("head.weight", 1.0, 0.05),
    ):
        assert by_name[name]["lr_scale"] == pytest.approx(scale), name
        assert by_name[name]["weight_decay"] == decay, name


PRETRAINED = {
    "mae": (
        {"name": "mae", "decoder_width": 16, "decoder_depth": 1, "decoder_num_heads": 2},
        ("decoder.blocks.0.attn.qkv.weight", "decoder.embed.weight", "decoder.mask_token"),
    ),
    "simmim": ({"name": "simmim", "mask_unit_px": 8}, ("head.weight", "mask_token")),
}


def pretraining_of(method: str, stage: int) -> Plan:
    recipe = parse_recipe(
        {
            "encoder": VIT,
            "method": PRETRAINED[method][0],
            "data": {"image_size": 16},
            "optim": {
                "batch_size": BATCH, "steps": 10, "layer_decay": DECAY, "weight_decay": 0.0,
                "eps": 1e-30,
            },
            "engine": {"zero_stage": stage, "precision": "fp32"},
        }
    )  # fmt: skip
    return resolve(recipe, DatasetFacts("here", 100, "f1"), 1)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("method", PRETRAINED)
def test_pretraining__decoders_have_the_full_rate_and_weights_to_begin_with_less(
    method: str, stage: int
):
    plan, rest = pretraining_of(method, stage), PRETRAINED[method][1]
    torch.manual_seed(0)
    built = build_method(plan.recipe).train()
    torch.manual_seed(7)
    start = build_encoder(plan.recipe.encoder, (16, 16)).state_dict()
    built.encoder.load_state_dict(start)
    fixed = fixed_weights(built)
    engine = initialize(built, plan, "fp32")
    before = full_state(engine, fixed)
    mask = torch.tensor([[True, False, True, False]] * BATCH)
    for group in engine.optimizer.param_groups:
        group["lr"] = 1e-3 * group["lr_scale"]

    engine.backward(engine(images=torch.randn(BATCH, 3, 16, 16), mask=mask).loss)
    engine.step()

    after = full_state(engine, fixed)
    for name, layers_above in (
        *((name, 0) for name in rest),
        ("encoder.norm.weight", 0),
        ("encoder.blocks.1.mlp.fc2.weight", 1),
        ("encoder.blocks.0.mlp.fc2.weight", 2),
        ("encoder.patch_embed.proj.weight", 3),
        ("encoder.cls_token", 3),
    ):
        # The first update of Adam is the learning rate, whatever the gradient.
        moved = (after[name] - before[name]).abs().max().item()
        assert moved == pytest.approx(1e-3 * DECAY**layers_above, rel=1e-2), name
    assert torch.equal(before["encoder.cls_token"], start["cls_token"])


def test_groups__without_decay_there_is_one_layer():
    recipe = plan_of().recipe
    groups = parameter_groups(
        build_method(recipe), recipe.optim.model_copy(update={"layer_decay": None})
    )

    assert [(g["weight_decay"], g["lr_scale"]) for g in groups] == [(0.05, 1.0), (0.0, 1.0)]


def engine_of(plan: Plan, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return initialize(build_method(plan.recipe).train(), plan, "fp32")


def update(engine: Any, step: int, lr: float) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    share = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    rng = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 3, 16, 16, generator=rng)
    labels = torch.randint(3, (BATCH,), generator=rng)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    engine.backward(engine(images=images[share], mask=None, labels=labels[share]).loss)
    engine.step()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_update__each_layer_moves_by_its_share(stage: int):
    engine = engine_of(plan_of(stage=stage, weight_decay=0.0, eps=1e-30))
    before = full_state(engine, {})

    update(engine, 0, lr=1e-3)

    # The first update of Adam is the learning rate, whatever the gradient.
    moved = {n: (v - before[n]).abs().max().item() for n, v in full_state(engine, {}).items()}
    assert moved["head.weight"] == pytest.approx(1e-3, rel=1e-3)
    # Behind a head of nearly zero gradients are small, but never exactly zero.
    for name, layers_above in (
        ("encoder.blocks.1.mlp.fc2.weight", 1),
        ("encoder.blocks.0.attn.qkv.weight", 2),
        ("encoder.patch_embed.proj.weight", 3),
        ("encoder.pos_embed", 3),
    ):
        assert moved[name] == pytest.approx(1e-3 * DECAY**layers_above, rel=1e-3), name


def identity_of(stage: int) -> Identity:
    return Identity("hash", stage, "fp32")


def work(folder: Path, rank: str) -> None:
    """The work of the two processes: two updates, a checkpoint, a third update, stages 1 and 3."""
    os.environ["LOCAL_RANK"] = rank
    prepare_process(torch.device("cpu"))
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=int(rank), world_size=2
    )
    for stage in (1, 3):
        engine = engine_of(plan_of(stage=stage, world_size=2))
        update(engine, 0, lr=1e-3)
        update(engine, 1, lr=1e-3)
        run = RunDir(f"{folder}/stage{stage}")
        save(run, engine, identity_of(stage), step=2, samples=2 * BATCH, keep=1)
        update(engine, 2, lr=1e-3)
        torch.save(full_state(engine, {}), f"{folder}/stage{stage}.{rank}.pt")
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


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("stage", [1, 3])
def test_resume__on_another_number_of_workers_keeps_each_group(stage: int, trained_by_two: Path):
    plan = plan_of(stage=stage)
    engine = engine_of(plan, seed=1)
    wanted = build_optimizer(build_method(plan.recipe), plan.recipe.optim).param_groups

    loaded = load_newest(RunDir(str(trained_by_two / f"stage{stage}")), engine, identity_of(stage))
    update(engine, 2, lr=1e-3)

    assert loaded is not None
    assert loaded.world_size == 2
    for key in ("lr_scale", "weight_decay", "betas"):
        assert [g[key] for g in engine.optimizer.param_groups] == [g[key] for g in wanted]
    theirs = torch.load(trained_by_two / f"stage{stage}.0.pt")
    for name, value in full_state(engine, {}).items():
        np.testing.assert_allclose(value, theirs[name], rtol=1e-4, atol=1e-5, err_msg=name)


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2])
