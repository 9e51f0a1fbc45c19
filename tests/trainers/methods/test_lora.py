"""Low-rank adapters: nothing at the start, alone in moving, plain weights at the end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mimray.trainers.engine.deepspeed import (
    fixed_weights,
    full_state,
    initialize,
)
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.methods.lora import merged
from tests.trainers.methods.lora_cases import CASES, adapted, moved, plan_of, update, with_biases

STEPS = 2


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
        if not name.startswith("averages."):  # they start anew
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
        trained = {n for n in after if not n.startswith("averages.")}
        adapters = {n for n in trained if n.endswith("lora_up")}
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
