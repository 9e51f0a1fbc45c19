"""Groups of parameters with a rate, a decay and a time of their own; values that move."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.config.run import Plan, resolve
from mimray.trainers.config.schedule import Schedule
from mimray.trainers.engine.deepspeed import initialize, master_weights
from mimray.trainers.engine.optim import (
    FrozenGradients,
    build_optimizer,
    check_trained,
    parameter_groups,
    set_hyperparameters,
)
from mimray.trainers.errors import ConfigError
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.types import DatasetFacts

TINY = (
    "encoder={name: vit, width: 8, depth: 1, num_heads: 1, patch_size: 4}",
    "method={name: mae, decoder_width: 8, decoder_depth: 1, decoder_num_heads: 1}",
    "data.image_size=8",
    "optim.batch_size=2",
    "optim.steps=10",
    "optim.warmup_steps=0",
    "optim.base_lr=1.28",  # 0.01 at a batch of 2
)
GROUPS = (
    "optim.groups=[{parameters: [decoder.pred.*], lr_scale: 0.5, weight_decay: 0.01, "
    "frozen_steps: 3}, {parameters: ['encoder.patch_embed.*'], lr_scale: 0.2}]"
)


def plan_of(*overrides: str) -> Plan:
    recipe = load_recipe("mae-tiny", [*TINY, *overrides])
    return resolve(recipe, DatasetFacts(uri="x", num_samples=100, fingerprint="x"), 1)


def by_name(plan: Plan, step: int) -> dict[str, dict[str, Any]]:
    method = build_method(plan.recipe)
    names = {id(p): n for n, p in method.named_parameters()}
    optimizer = build_optimizer(method, plan.recipe.optim)
    set_hyperparameters(optimizer, plan, step)
    return {names[id(p)]: g for g in optimizer.param_groups for p in g["params"]}


def test_groups__have_rates_decays_and_a_time_of_their_own():
    plan = plan_of(GROUPS, "optim.weight_decay={start: 0.1, end: 0.3, shape: linear}")

    early, late = by_name(plan, 2), by_name(plan, 5)

    rate = 0.01 * 0.5 * (1 + math.cos(math.pi * 0.5))
    for name, lr, decay in (
        ("decoder.pred.weight", 0.5 * rate, 0.01),
        ("decoder.pred.bias", 0.5 * rate, 0.0),
        ("encoder.patch_embed.proj.weight", 0.2 * rate, 0.2),
        ("encoder.blocks.0.attn.qkv.weight", rate, 0.2),
        ("encoder.norm.weight", rate, 0.0),
    ):
        assert late[name]["lr"] == pytest.approx(lr), name
        assert late[name]["weight_decay"] == pytest.approx(decay), name
    assert early["decoder.pred.weight"]["lr"] == 0.0
    assert early["encoder.norm.weight"]["lr"] > 0.0


def test_groups__of_plain_recipes_carry_nothing_new():
    plan = plan_of()

    groups = parameter_groups(build_method(plan.recipe), plan.recipe.optim)

    assert [sorted(group) for group in groups] == [["lr_scale", "params", "weight_decay"]] * 2


@pytest.mark.parametrize(
    "groups", ["[{parameters: [nothing.*]}]", "[{parameters: ['*']}, {parameters: [encoder.*]}]"]
)
def test_groups__that_name_nothing_are_refused(groups: str):
    plan = plan_of(f"optim.groups={groups}")

    with pytest.raises(ConfigError, match="which is no parameter that is trained, or one that"):
        build_optimizer(build_method(plan.recipe), plan.recipe.optim)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_frozen__weights_and_moments_stay_until_the_step(stage: int):
    plan = plan_of(GROUPS, f"engine.zero_stage={stage}")
    torch.manual_seed(0)
    method = build_method(plan.recipe)
    frozen = FrozenGradients(method, plan.recipe.optim)
    engine = initialize(method, plan, "fp32")
    seen = [{n: v.clone() for n, v in master_weights(engine)}]
    mask = torch.tensor([[True, False, True, True]] * 2)

    for step in range(4):
        frozen.step = step
        set_hyperparameters(engine.optimizer, plan, step)
        engine.backward(engine(images=torch.randn(2, 3, 8, 8), mask=mask).loss)
        engine.step()
        seen.append({n: v.clone() for n, v in master_weights(engine)})

    # The first update of Adam is a whole step where moments were empty, a part of it where not.
    for name in ("decoder.pred.weight", "decoder.pred.bias"):
        assert all(torch.equal(state[name], seen[0][name]) for state in seen[:4]), name
        assert not torch.equal(seen[4][name], seen[0][name]), name
    other = "encoder.patch_embed.proj.weight"
    assert not torch.equal(seen[1][other], seen[0][other])


# Gradual unfreezing: of one block, so that the block is a layer above the patches, and the norm
# behind both.
UNFREEZE = "optim.unfreeze_every_steps=2"
BEGINS = {
    "decoder.pred.weight": 0,
    "encoder.norm.weight": 0,
    "encoder.blocks.0.attn.qkv.weight": 2,
    "encoder.blocks.0.norm1.bias": 2,
    "encoder.patch_embed.proj.weight": 4,
    "encoder.cls_token": 4,
}


def test_unfreezing__layers_begin_one_after_the_other_from_the_last():
    plan = plan_of(UNFREEZE)

    for step in range(6):
        found = by_name(plan, step)
        begun = {name for name in BEGINS if found[name]["lr"] > 0}
        assert begun == {name for name, first in BEGINS.items() if first <= step}, step


def test_unfreezing__goes_with_groups_and_layer_decay():
    plan = plan_of(
        UNFREEZE,
        "optim.layer_decay=0.5",
        "optim.groups=[{parameters: ['encoder.blocks.*'], frozen_steps: 3}]",
        "optim.betas=[0.0, 0.0]",  # without moments, rates are those of layer decay
    )

    early, late = by_name(plan, 2), by_name(plan, 5)

    assert early["encoder.blocks.0.attn.qkv.weight"]["lr"] == 0.0  # the later of both counts
    rate = late["encoder.norm.weight"]["lr"]
    assert late["encoder.blocks.0.attn.qkv.weight"]["lr"] == pytest.approx(rate / 2)
    assert late["encoder.patch_embed.proj.weight"]["lr"] == pytest.approx(rate / 4)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_unfreezing__a_layer_stays_until_its_step_and_then_learns_as_from_the_first(
    stage: int, beta2: float
):
    plan = plan_of(UNFREEZE, f"engine.zero_stage={stage}", f"optim.betas=[0.9,{beta2}]")
    torch.manual_seed(0)
    method = build_method(plan.recipe)
    frozen = FrozenGradients(method, plan.recipe.optim)
    engine = initialize(method, plan, "fp32")
    seen = [{n: v.clone() for n, v in master_weights(engine)}]
    mask = torch.tensor([[True, False, True, True]] * 2)

    for step in range(6):
        frozen.step = step
        set_hyperparameters(engine.optimizer, plan, step)
        engine.backward(engine(images=torch.randn(2, 3, 8, 8), mask=mask).loss)
        engine.step()
        seen.append({n: v.clone() for n, v in master_weights(engine)})

    for name, first in BEGINS.items():
        assert all(torch.equal(state[name], seen[0][name]) for state in seen[: first + 1]), name
        moved = (seen[first + 1][name] - seen[first][name]).abs()
        if name != "encoder.cls_token":  # it decays as well, whatever its size
            rate = 0.01 * 0.5 * (1 + math.cos(math.pi * first / 10))
            decay = rate * 0.05 * seen[first][name].abs().max().item()
            # The first update of Adam is the rate; 3.2 times as much, were the updates before
            # counted at a beta of .999.
            assert moved.max().item() == pytest.approx(rate, rel=1e-2, abs=decay), name


def test_unfreezing__plans_and_groups_without_it_are_those_of_before():
    plan = plan_of(GROUPS)

    groups = parameter_groups(build_method(plan.recipe), plan.recipe.optim)

    assert all("frozen_steps" not in group for group in groups)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optim.unfreeze_every_steps=5"], "train the first of 2 layers after 10 steps, and the "
         "run has 10 .--set optim.unfreeze_every_steps=4, or less"),
        (["optim.unfreeze_every_steps=1", "optim.steps=2"], "a run of more than 2 steps"),
        (["optim.groups=[{parameters: [nothing.*]}]"], "optim.groups names nothing"),
    ],
)  # fmt: skip
def test_check__refuses_before_the_run_what_would_never_train(overrides: list[str], said: str):
    with pytest.raises(ConfigError, match=said):
        check_trained(plan_of(*overrides))


@pytest.mark.parametrize("value", ["0", "-3", "1.5"])
def test_unfreezing__is_a_number_of_updates(value: str):
    with pytest.raises(ConfigError, match="optim.unfreeze_every_steps"):
        plan_of(f"optim.unfreeze_every_steps={value}")


@pytest.mark.parametrize(
    ("options", "values"),
    [
        ({"start": 0.05}, {0: 0.05, 99: 0.05}),
        ({"start": 0.04, "end": 0.4, "shape": "linear"}, {0: 0.04, 50: 0.22, 100: 0.4}),
        (
            {"start": 0.996, "end": 1.0},
            {0: 0.996, 50: 0.998, 25: 1 - 0.004 * 0.5 * (1 + math.cos(math.pi / 4)), 100: 1.0},
        ),
        # As CAPI: 1 to .999 over the warm-up, then a cosine cut at four fifths of its way.
        (
            {"start": 0.999, "end": 1.0, "warmup_start": 1.0, "warmup_steps": 20, "length": 1.25},
            {
                0: 1.0,
                10: 0.9995,
                20: 0.999,
                100: 1 - 0.001 * 0.5 * (1 + math.cos(math.pi * 80 / 105)),
            },
        ),
        # As iBOT's temperature: linear over so many steps, then constant.
        (
            {"start": 0.07, "warmup_start": 0.04, "warmup_steps": 30},
            {0: 0.04, 15: 0.055, 30: 0.07, 90: 0.07},
        ),
        ({"start": 1.0, "end": 0.0, "shape": "linear", "steps": 40}, {10: 0.75, 40: 0.0, 80: 0.0}),
    ],
)
def test_schedule__is_a_function_of_the_step(options: dict[str, Any], values: dict[int, float]):
    schedule = Schedule(**options)

    for step, value in values.items():
        assert schedule.at(step, 100) == pytest.approx(value, abs=1e-12), step


def test_schedule__a_constant_is_written_as_the_number_it_was_read_from():
    plain, moving = (
        plan_of("optim.weight_decay=0.05"),
        plan_of("optim.weight_decay={start: 0.04, end: 0.4}"),
    )

    assert plain.recipe.model_dump(mode="json")["optim"]["weight_decay"] == 0.05
    assert Plan.model_validate_json(moving.model_dump_json()) == moving
    with pytest.raises(ConfigError, match="must not be negative"):
        plan_of("optim.weight_decay=-1")
