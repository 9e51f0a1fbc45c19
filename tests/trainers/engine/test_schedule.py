"""Learning rates against closed formulas and torch's schedulers; weight decay by name."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mimray.trainers.config.optim import OptimConfig
from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.config.run import Plan, parse_recipe, resolve
from mimray.trainers.engine.optim import parameter_groups
from mimray.trainers.engine.schedule import learning_rate
from mimray.trainers.errors import ConfigError
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.types import DatasetFacts

IMAGENET = DatasetFacts("imagenet", 1_281_167, "f1")
PEAK = 2e-3
MULTISTEP = {"schedule": "multistep", "milestones": [0.5, 0.875], "gamma": 0.1}


def plan_of(**optim: Any) -> Plan:
    recipe = parse_recipe(
        {
            "encoder": {"name": "vit", "width": 16, "depth": 1, "num_heads": 2, "patch_size": 8},
            "method": {"name": "simmim", "mask_unit_px": 8},
            "data": {"image_size": 16},
            "optim": {"batch_size": 512, "base_lr": PEAK / 2, "steps": 100, **optim},
        }
    )
    return resolve(recipe, IMAGENET, world_size=1)


def rates_of(plan: Plan) -> np.ndarray:
    return np.array([learning_rate(plan, step) for step in range(plan.steps)])


RUNS = {
    "steps": st.integers(2, 300),
    "share": st.floats(0, 0.9),
    "start": st.sampled_from([0.0, 1e-6]),
    "end": st.sampled_from([0.0, 1e-5]),
}


@given(**RUNS)
@settings(max_examples=40)
def test_cosine__a_line_then_half_a_wave(steps: int, share: float, start: float, end: float):
    warm = int(steps * share)
    plan = plan_of(steps=steps, warmup_steps=warm, warmup_lr=start, min_lr=end)

    rates = rates_of(plan)

    line = start + (PEAK - start) * np.arange(warm) / max(1, warm)
    wave = np.cos(np.pi / 2 * np.arange(steps - warm) / (steps - warm)) ** 2
    expected = np.concatenate([line, end + (PEAK - end) * wave])
    np.testing.assert_allclose(rates, expected, rtol=1e-9, atol=1e-18)
    assert learning_rate(plan, steps) == pytest.approx(end, abs=1e-18)


@given(
    **RUNS,
    milestones=st.lists(st.floats(0.91, 0.99), min_size=1, max_size=3).map(sorted),
    gamma=st.floats(0.05, 0.9),
)
@settings(max_examples=40)
def test_multistep__a_line_then_stairs(
    steps: int, share: float, start: float, end: float, milestones: list[float], gamma: float
):
    warm = int(steps * share)
    plan = plan_of(
        steps=steps,
        warmup_steps=warm,
        warmup_lr=start,
        min_lr=end,
        schedule="multistep",
        milestones=milestones,
        gamma=gamma,
    )

    rates = rates_of(plan)

    expected = np.concatenate(
        [np.linspace(start, PEAK, warm, endpoint=False), np.full(steps - warm, PEAK)]
    )
    for milestone in milestones:
        expected[round(steps * milestone) :] *= gamma
    after = np.arange(steps) >= warm
    np.testing.assert_allclose(rates, np.where(after, expected.clip(end), expected), rtol=1e-9)


def torchs(scheduler: type, **options: Any) -> list[float]:
    """Rates of 100 updates under one of torch's schedulers."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule = scheduler(optimizer, **options)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_schedules__without_a_warm_up_are_torchs():
    lr_scheduler = torch.optim.lr_scheduler

    cosine = rates_of(plan_of(min_lr=1e-5))
    multistep = rates_of(plan_of(**MULTISTEP))

    theirs = torchs(lr_scheduler.CosineAnnealingLR, T_max=100, eta_min=1e-5)
    np.testing.assert_allclose(cosine, theirs, rtol=1e-9)
    theirs = torchs(lr_scheduler.MultiStepLR, milestones=[50, 88], gamma=0.1)
    np.testing.assert_allclose(multistep, theirs, rtol=1e-9)


@pytest.mark.parametrize("name", ["simmim-swin-b", "simmim-vit-b"])
def test_simmim__rates_are_the_published_ones(name: str):
    plan = resolve(load_recipe(name), IMAGENET, world_size=16)
    epoch = plan.steps / 800

    rates = [learning_rate(plan, round(epoch * at)) for at in (0, 5, 10, 699.9, 700.1, 799.9)]

    # Official: 1e-4 and 5e-7 a batch of 512, so four times that at 2048.
    expected = [2e-6, (2e-6 + 4e-4) / 2, 4e-4, 4e-4, 4e-5, 4e-5]
    np.testing.assert_allclose(rates, expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ({"schedule": "multistep"}, "'milestones' and schedule 'multistep' go together"),
        ({"milestones": [0.5]}, "'milestones' and schedule 'multistep' go together"),
        ({"schedule": "multistep", "milestones": [0.9, 0.5]}, "must rise"),
        ({"schedule": "multistep", "milestones": [700]}, "lie between 0 and 1"),
    ],
)
def test_multistep__refuses_milestones_that_make_no_stairs(optim: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        plan_of(**optim)


SMALL = ["encoder.width=16", "data.image_size=32"]
VIT = [*SMALL, "encoder.depth=2", "encoder.num_heads=2", "encoder.patch_size=8"]
SWIN = [*SMALL, "encoder.depths=[1,2]", "encoder.num_heads=[2,2]", "encoder.window_size=4"]
UNIT = "method.mask_unit_px=8"
# Biases, scales of norms and of residual branches: all that has one dimension.
OF_ONE_DIMENSION = re.compile(r"(.*\.)?(bias|norm\d?\.weight|ls\d\.gamma)")


@pytest.mark.parametrize(
    ("name", "overrides", "named", "frozen"),
    [
        (
            "mae-tiny",
            ["encoder.layer_scale=0.1"],
            set(),
            {"encoder.pos_embed", "decoder.pos_embed"},
        ),
        ("simmim-vit-b", [*VIT, UNIT], {"encoder.cls_token"}, set()),
        ("simmim-swin-b", [*SWIN, UNIT], {"mask_token"}, set()),
        (
            "simmim-swin-b",
            [*SWIN, UNIT, "optim.no_decay=[mask_token, relative_position_bias_table]"],
            {
                "mask_token",
                "encoder.layers.0.blocks.0.attn.relative_position_bias_table",
                "encoder.layers.1.blocks.0.attn.relative_position_bias_table",
                "encoder.layers.1.blocks.1.attn.relative_position_bias_table",
            },
            set(),
        ),
    ],
    ids=["mae", "simmim-vit", "simmim-swin", "simmim-swin-tables"],
)
def test_parameter_groups__spare_biases_norms_and_what_is_named(
    name: str, overrides: list[str], named: set[str], frozen: set[str]
):
    from timm.optim import param_groups_weight_decay

    recipe = load_recipe(name, overrides)
    method = build_method(recipe)
    names = {id(p): n for n, p in method.named_parameters()}

    groups = parameter_groups(method, recipe.optim)

    decayed, spared = ({names[id(p)] for p in group["params"]} for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    assert spared == named | {n for n in names.values() if OF_ONE_DIMENSION.fullmatch(n)}
    assert decayed == set(names.values()) - spared - frozen
    timms = param_groups_weight_decay(method, 0.05, no_weight_decay_list=named)
    theirs = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in timms}
    assert theirs == {0.05: decayed, 0.0: spared}


def test_parameter_groups__of_shards_go_by_the_whole_shape():
    module = nn.Linear(3, 2)
    for parameter in module.parameters():
        parameter.ds_shape = parameter.shape  # as ZeRO-3 leaves them
        parameter.data = torch.empty(0)

    groups = parameter_groups(module, OptimConfig(steps=1))

    assert [group["params"] for group in groups] == [[module.weight], [module.bias]]
