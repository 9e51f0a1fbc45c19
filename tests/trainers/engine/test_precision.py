"""Precision and offload at every ZeRO stage: the same losses, fp32 weights, a right counter."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.config.run import Plan, resolve
from mimray.trainers.engine import checkpoints
from mimray.trainers.engine.checkpoints import MANIFEST, Identity
from mimray.trainers.engine.deepspeed import fixed_weights, full_state, initialize
from mimray.trainers.engine.export import read_checkpoint
from mimray.trainers.engine.optim import set_hyperparameters
from mimray.trainers.errors import CheckpointError
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.models.full_precision import full_precision
from mimray.trainers.models.kmeans import nearest_codes
from mimray.trainers.storage import RunDir
from mimray.trainers.types import DatasetFacts

STEPS, BATCH = 20, 4
# Small, as bf16 is emulated on many CPUs.
SMALL = (
    "encoder.name=vit", "encoder.width=16", "encoder.depth=1", "encoder.num_heads=2",
    "method.decoder_width=16", "method.decoder_num_heads=2", "data.image_size=16",
    f"optim.batch_size={BATCH}", "optim.base_lr=0.1", "optim.warmup_epochs=null",
    "optim.warmup_steps=2",
)  # fmt: skip
LARGER = (
    "encoder.width=32", "encoder.depth=2", "encoder.num_heads=2", f"optim.batch_size={BATCH}",
    "optim.base_lr=0.05", "optim.warmup_epochs=null", "optim.warmup_steps=2",
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("process_group")


@dataclass(frozen=True)
class Result:
    """The outcome of `train`.

    Attributes:
        losses: the loss of each step.
        updates: Adam's counters.
        state: whole fp32 weights.
    """

    losses: list[float]
    updates: set[float]
    state: dict[str, Tensor]


def plan_of(stage: int, *overrides: str, name: str = "mae-tiny") -> Plan:
    recipe = load_recipe(name, [f"engine.zero_stage={stage}", *overrides], steps=100)
    return resolve(recipe, DatasetFacts("here", 1000, "f"), 1)


def train(
    plan: Plan,
    precision: str,
    steps: int = STEPS,
    *,
    save_as: RunDir | None = None,
    continues: RunDir | None = None,
) -> Result:
    torch.manual_seed(0)
    method = build_method(plan.recipe).train()
    fixed = fixed_weights(method)
    engine = initialize(method, plan, precision)
    identity = Identity(plan.hash, plan.recipe.engine.zero_stage, precision)
    first = 0
    if continues is not None:
        checkpoint = checkpoints.load_newest(continues, engine, identity)
        assert checkpoint is not None
        first = checkpoint.step
    losses = []
    for step in range(first, steps):
        set_hyperparameters(engine.optimizer, plan, step)
        rng = torch.Generator().manual_seed(step % 3)
        images = torch.randn(BATCH, 3, *plan.recipe.data.image_size, generator=rng)
        torch.manual_seed(step)
        engine.module.at_step(step, plan.steps)
        output = engine(images=images)
        engine.backward(output.loss)
        engine.step()
        engine.module.after_step(step + 1)
        losses.append(float(output.loss))
    if save_as is not None:
        save_as.create()
        checkpoints.save(save_as, engine, identity, step=steps, samples=steps * BATCH, keep=1)
    adam = getattr(engine.optimizer, "optimizer", engine.optimizer)
    updates = {float(state["step"]) for state in adam.state.values()}
    return Result(losses, updates, full_state(engine, fixed))


def check_bf16(stage: int, *overrides: str, name: str = "mae-tiny", rtol: float = 0.01) -> None:
    """bf16 against fp32 at stage 0."""
    plain = train(plan_of(0, *overrides, name=name), "fp32")
    half = train(plan_of(stage, *overrides, name=name), "bf16")
    assert plain.losses[-1] < 0.9 * plain.losses[0]  # it learns, or there is nothing to compare
    assert half.losses != plain.losses
    np.testing.assert_allclose(half.losses, plain.losses, rtol=rtol)
    assert half.updates == plain.updates == {float(STEPS)}
    for key, value in half.state.items():
        assert value.dtype == torch.float32
        trained = not torch.equal(value, value.bfloat16().float())
        assert trained or torch.equal(plain.state[key], plain.state[key].bfloat16().float()), key


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16__losses_are_those_of_fp32_at_every_stage(stage: int) -> None:
    check_bf16(stage, *SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mae-tiny", "simmim-tiny", "maskfeat-tiny"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16__losses_of_other_methods_are_those_of_fp32(stage: int, name: str) -> None:
    check_bf16(stage, *LARGER, name=name)


def test_run__is_the_same_after_one_at_stage_3_in_this_process() -> None:
    before = train(plan_of(1, *SMALL), "bf16", steps=2)
    train(plan_of(3, *SMALL), "bf16", steps=1)
    after = train(plan_of(1, *SMALL), "bf16", steps=2)
    assert after.losses == before.losses
    assert torch.nn.functional.linear is torch._C._nn.linear  # which stage 3 replaces


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_weights__keep_fp32_masters(stage: int) -> None:
    plain = train(plan_of(0, *SMALL), "fp32")
    half = train(plan_of(stage, *SMALL), "bf16_weights")
    np.testing.assert_allclose(half.losses, plain.losses, rtol=0.02)
    assert half.updates == {float(STEPS)}
    norm = half.state["encoder.norm.weight"]
    assert not torch.equal(norm, norm.bfloat16().float())


@pytest.mark.parametrize(
    ("stage", "offload", "precision"),
    [
        (1, "optimizer", "fp32"),
        (2, "optimizer", "bf16"),
        (3, "all", "bf16"),
        *(
            pytest.param(stage, offload, precision, marks=pytest.mark.slow)
            for stage, offload in ((1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all"))
            for precision in ("fp32", "bf16", "bf16_weights")
        ),
    ],
)
def test_offload__changes_no_loss(stage: int, offload: str, precision: str) -> None:
    here = train(plan_of(stage, *SMALL), precision)
    away = train(plan_of(stage, *SMALL, f"engine.offload={offload}"), precision)
    assert away.losses == here.losses
    assert away.updates == here.updates
    for name, value in here.state.items():
        assert torch.equal(away.state[name], value), name


@pytest.mark.parametrize(
    ("stage", "offload"), [(0, "none"), (1, "optimizer"), (2, "optimizer"), (3, "all")]
)
def test_checkpoint__goes_on_bit_for_bit(stage: int, offload: str, tmp_path: Path) -> None:
    plan = plan_of(stage, *SMALL, f"engine.offload={offload}")
    run = RunDir(str(tmp_path / "run"))
    whole = train(plan, "bf16", steps=6)
    train(plan, "bf16", steps=3, save_as=run)
    rest = train(plan, "bf16", steps=6, continues=run)
    assert rest.losses == whole.losses[3:]
    assert rest.updates == whole.updates
    for name, value in whole.state.items():
        assert torch.equal(rest.state[name], value), name


@pytest.mark.parametrize("stage", [0, 1])
def test_checkpoint__of_bf16_holds_the_weights_that_the_run_ends_with(
    stage: int, tmp_path: Path
) -> None:
    plan, run = plan_of(stage, *SMALL), RunDir(str(tmp_path / "run"))
    result = train(plan, "bf16", steps=3, save_as=run)
    (checkpoint,) = checkpoints.find(run)
    folder = tmp_path / "run/checkpoints" / checkpoint.name
    read = read_checkpoint(run, folder, checkpoint, plan)
    assert read.keys() == result.state.keys()
    for name, value in result.state.items():
        assert torch.equal(read[name], value), name


@pytest.mark.parametrize("stage", [0, 1])
def test_checkpoint__of_an_earlier_version_in_bf16_does_not_go_on_in_silence(
    stage: int, tmp_path: Path
) -> None:
    plan, run = plan_of(stage, *SMALL), RunDir(str(tmp_path / "run"))
    train(plan, "bf16", steps=1, save_as=run)
    (manifest,) = (tmp_path / "run").rglob(MANIFEST)
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 1}))

    (checkpoint,) = checkpoints.find(run)
    assert checkpoint.precision == "bf16_weights"
    engine = initialize(build_method(plan.recipe), plan, "bf16")
    with pytest.raises(CheckpointError, match="precision bf16_weights, wanted bf16 .*--fresh"):
        checkpoints.load_newest(run, engine, Identity(plan.hash, stage, "bf16"))
    if stage == 0:
        with pytest.raises(CheckpointError, match="weights rounded to bf16"):
            read_checkpoint(run, manifest.parent, checkpoint, plan)


@pytest.mark.parametrize("precision", ["fp32", "bf16_weights"])
def test_checkpoint__of_an_earlier_version_with_the_same_meaning_goes_on(
    precision: str, tmp_path: Path
) -> None:
    plan, run = plan_of(1, *SMALL), RunDir(str(tmp_path / "run"))
    train(plan, precision, steps=1, save_as=run)
    (manifest,) = (tmp_path / "run").rglob(MANIFEST)
    written = "bf16" if precision == "bf16_weights" else precision
    old = {**json.loads(manifest.read_text()), "format": 1, "precision": written}
    manifest.write_text(json.dumps(old))

    engine = initialize(build_method(plan.recipe), plan, precision)
    loaded = checkpoints.load_newest(run, engine, Identity(plan.hash, 1, precision))
    assert loaded is not None
    assert loaded.step == 1


def test_autocast__of_a_first_use_without_gradients_does_not_lose_them() -> None:
    """Torch's cache of casts would hand the constants of the first use to the second."""

    plan = plan_of(0, *SMALL)
    method = build_method(plan.recipe)
    plain = method.forward

    def twice(images: Tensor) -> object:
        with torch.no_grad():
            plain(images)
        return plain(images)

    method.__dict__["forward"] = twice
    engine = initialize(method, plan, "bf16")
    engine.backward(engine(images=torch.randn(BATCH, 3, 16, 16)).loss)
    gradients = {n: p.grad for n, p in method.named_parameters() if p.requires_grad}
    assert all(g is not None and g.abs().sum() > 0 for g in gradients.values()), gradients.keys()


def test_full_precision__codes_are_those_without_autocast() -> None:
    torch.manual_seed(0)
    vectors, table = torch.randn(4096, 16), torch.randn(512, 16)
    wanted = nearest_codes(vectors, table)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_codes(vectors, table), wanted)
        with full_precision(vectors):
            assert (vectors @ table.T).dtype == torch.float32
        assert (vectors @ table.T).dtype == torch.bfloat16
