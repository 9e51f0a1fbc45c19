"""Moving averages: fp32 whatever happens to the method around them, and exact over long runs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mimray.trainers.config.run import Plan, parse_recipe, resolve
from mimray.trainers.config.schedule import Schedule
from mimray.trainers.engine.deepspeed import (
    DTYPES,
    fixed_weights,
    follow,
    full_state,
    initialize,
    master_weights,
)
from mimray.trainers.engine.loop import _update
from mimray.trainers.methods.catalogue import build_method, inputs_of
from mimray.trainers.models.averages import MovingAverages
from mimray.trainers.types import Batch, DatasetFacts


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9), nn.BatchNorm1d(4))
        self.averages = MovingAverages({"body": self.body}, Schedule(start=0.5))


def test_averages__are_buffers_in_evaluation_mode_whatever_becomes_of_the_method():
    pair = Pair().train()

    assert list(pair.averages.parameters()) == []
    assert not pair.averages.body.training
    assert not pair.averages.train().training
    assert {n for n, _ in pair.averages.body.named_buffers()} == pair.body.state_dict().keys()


def test_averages__stay_in_fp32_and_compute_in_the_methods_precision():
    pair, inputs = Pair(), torch.randn(3, 4)
    before = {n: b.clone() for n, b in pair.averages.named_buffers()}

    pair.bfloat16().to("cpu")

    assert pair.body[0].weight.dtype == torch.bfloat16
    for name, buffer in pair.averages.body.named_buffers():
        assert torch.equal(buffer, before[f"body.{name}"]), name
        assert buffer.dtype == before[f"body.{name}"].dtype
    twin = Pair()
    twin.averages.load_state_dict(pair.averages.state_dict())
    found, exact = pair.averages("body", inputs.bfloat16()), twin.averages("body", inputs)
    assert not found.requires_grad
    torch.testing.assert_close(found.float(), exact, rtol=0.05, atol=0.05)
    assert not torch.equal(found.float(), exact)


def test_update__reaches_a_goal_that_is_less_than_a_rounding_away():
    pair, goal = Pair(), torch.rand(4, 4) + 0.5
    weight = pair.averages.body[0].weight
    exact = weight.double().clone()

    for _ in range(60_000):
        pair.averages.update([("body.0.weight", goal)], momentum=0.9999)
    exact = goal.double() + (exact - goal.double()) * 0.9999**60_000

    assert float(((weight.double() - exact) / exact).abs().max()) < 2e-6


def test_update__is_a_lerp_of_floats_and_a_copy_of_counters():
    pair = Pair()
    before = pair.averages.body[0].weight.clone()
    weight, counter = torch.randn(4, 4), torch.tensor(7)

    pair.averages.update(
        [("body.0.weight", weight), ("body.2.num_batches_tracked", counter)], momentum=0.9
    )

    torch.testing.assert_close(pair.averages.body[0].weight, 0.9 * before + 0.1 * weight)
    assert pair.averages.body[2].num_batches_tracked == 7


def plan_of(stage: int, precision: str) -> Plan:
    recipe = parse_recipe({
        "encoder": {"name": "vit", "width": 8, "depth": 1, "num_heads": 1, "patch_size": 4},
        "method": {"name": "mae", "decoder_width": 8, "decoder_depth": 1, "decoder_num_heads": 1},
        "data": {"image_size": 8},
        "optim": {"batch_size": 2, "steps": 1000, "base_lr": 0.1},
        "engine": {"zero_stage": stage, "precision": precision},
    })  # fmt: skip
    return resolve(recipe, DatasetFacts(uri="x", num_samples=100, fingerprint="x"), 1)


def engine_of(stage: int, precision: str) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    plan = plan_of(stage, precision)
    method = build_method(plan.recipe)
    method.averages = MovingAverages({"encoder": method.encoder}, Schedule(start=0.99))
    fixed = fixed_weights(method)
    return initialize(method, plan, precision), fixed


def in_encoder(name: str) -> bool:
    return name.startswith("encoder.")


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        *((0, "bf16"), (1, "bf16_weights"), (3, "bf16")),
        *(
            pytest.param(stage, precision, marks=pytest.mark.slow)
            for stage, precision in (
                *((1, "bf16"), (2, "bf16"), (2, "bf16_weights"), (3, "bf16_weights")),
                *((stage, "fp32") for stage in range(4)),
            )
        ),
    ],
)
def test_follow__a_thousand_steps_are_those_in_double_precision(stage: int, precision: str):
    engine, fixed = engine_of(stage, precision)
    averages = engine.module.averages
    exact = {n: v.double().clone() for n, v in master_weights(engine, in_encoder)}
    mask = torch.tensor([[True, False, True, True]] * 2)
    trained = 20  # updates by the optimiser

    for step in range(1000):
        if step < trained:
            images = torch.randn(2, 3, 8, 8, dtype=DTYPES[precision])
            engine.backward(engine(images=images, mask=mask).loss)
            engine.step()
            assert engine.was_step_applied()
            masters = {n: v.double().clone() for n, v in master_weights(engine, in_encoder)}
        follow(engine, averages, 0.99)
        for name, value in masters.items():
            exact[name].mul_(0.99).add_(value, alpha=0.01)

    state = full_state(engine, fixed)
    assert len(exact) > 15
    for name, value in exact.items():
        found = state[f"averages.{name}"].double()
        assert (found - value).norm() <= 1e-6 * value.norm(), name
        assert torch.equal(state[name].double(), masters[name]), name


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("stage", [1, 3])
def test_master_weights__of_bf16_are_finer_than_the_weights(stage: int):
    engine, _ = engine_of(stage, "bf16_weights")
    start = {n: v.clone() for n, v in master_weights(engine)}
    mask = torch.tensor([[True, False, True, True]] * 2)
    for group in engine.optimizer.param_groups:
        group["lr"] = 1e-5

    images = torch.randn(2, 3, 8, 8, dtype=torch.bfloat16)
    engine.backward(engine(images=images, mask=mask).loss)
    engine.step()

    weights = dict(engine.module.named_parameters())
    name = "encoder.norm.weight"  # ones, which an update of 1e-5 does not move in bf16
    moved = dict(master_weights(engine))[name]
    assert torch.equal(weights[name].float(), torch.ones(8))
    assert 0 < float((moved - start[name]).abs().max()) < 1e-4


@pytest.mark.usefixtures("process_group")
def test_update__skips_the_averages_of_a_step_that_was_skipped():
    plan = plan_of(1, "bf16_weights")
    checks = {"deepspeed": {"bf16": {"check_grad_overflow": True}}}
    engine_config = plan.recipe.engine.model_copy(update=checks)
    plan = plan.model_copy(
        update={"recipe": plan.recipe.model_copy(update={"engine": engine_config})}
    )
    method = build_method(plan.recipe)
    method.averages = MovingAverages({"encoder": method.encoder}, Schedule(start=0.5))
    method.ema = MovingAverages({"encoder": method.encoder}, Schedule(start=0.5))
    overflows: list[bool] = []
    method.decoder.pred.weight.register_hook(lambda g: g * torch.inf if overflows[-1] else g)
    engine, inputs = initialize(method, plan, "bf16_weights"), inputs_of(plan.recipe)
    mask = torch.tensor([[True, False, True, True]] * 2)
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    batch = Batch({"images": pixels, "mask": mask}, np.arange(2), np.zeros(2))
    seen = [method.averages.encoder.norm.bias.clone()]

    for step, overflow in enumerate((False, True, False)):
        overflows.append(overflow)
        _update(engine, plan, iter([batch]), inputs, step, torch.device("cpu"))
        assert engine.was_step_applied() is not overflow
        seen.append(method.averages.encoder.norm.bias.clone())
        assert torch.equal(method.ema.encoder.norm.bias, seen[-1])

    assert [torch.equal(a, b) for a, b in pairwise(seen)] == [False, True, False]
