from __future__ import annotations

import numpy as np
import pytest
import torch

from mimray.trainers.config.run import Plan, parse_recipe, resolve
from mimray.trainers.engine.optim import build_optimizer, parameter_groups
from mimray.trainers.engine.schedule import learning_rate
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.types import DatasetFacts


def plan_of(**optim: float) -> Plan:
    recipe = parse_recipe(
        {
            "encoder": {"name": "vit", "width": 16, "depth": 1, "num_heads": 2, "patch_size": 8},
            "method": {
                "name": "mae",
                "decoder_width": 8,
                "decoder_depth": 1,
                "decoder_num_heads": 2,
            },
            "data": {"image_size": 16},
            "optim": {"batch_size": 512, "steps": 100, "base_lr": 1e-3, **optim},
        }
    )
    return resolve(recipe, DatasetFacts("here", 10_000, "f1"), world_size=1)


def test_learning_rate__linear_then_half_a_cosine():
    plan = plan_of(warmup_steps=20, min_lr=1e-5)

    rates = [learning_rate(plan, step) for step in range(101)]

    peak = 1e-3 * 512 / 256
    wave = np.cos(np.linspace(0, np.pi, 81))
    expected = np.concatenate(
        [np.linspace(0, peak, 21)[:-1], 1e-5 + (peak - 1e-5) * (1 + wave) / 2]
    )
    np.testing.assert_allclose(rates, expected, rtol=1e-12, atol=1e-18)


def test_learning_rate__without_warm_up_starts_at_the_peak():
    plan = plan_of()

    assert learning_rate(plan, 0) == pytest.approx(plan.lr)
    assert learning_rate(plan, 100) == pytest.approx(0, abs=1e-18)


def test_parameter_groups__by_name():
    method = build_method(plan_of().recipe)
    names = {id(p): n for n, p in method.named_parameters()}

    groups = parameter_groups(method, method.recipe.optim)

    decayed, plain = ({names[id(p)] for p in group["params"]} for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    assert decayed >= {
        "encoder.cls_token",
        "decoder.mask_token",
        "encoder.patch_embed.proj.weight",
        "encoder.blocks.0.attn.qkv.weight",
        "decoder.pred.weight",
    }
    assert all(n.endswith(("weight", "token")) for n in decayed)
    assert not any("norm" in n or n.endswith("bias") for n in decayed)
    assert {n for n in names.values() if "norm" in n or n.endswith("bias")} == plain
    assert set(names.values()) - decayed - plain == {"encoder.pos_embed", "decoder.pos_embed"}


def test_build_optimizer__one_update_is_adamw_written_out():
    torch.manual_seed(0)
    config = plan_of(weight_decay=0.1).recipe.optim
    module = torch.nn.Linear(3, 2)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    optimizer = build_optimizer(module, config)
    module(torch.randn(5, 3)).square().sum().backward()

    optimizer.step()

    # After one step of Adam both moments, bias corrected, are those of the one gradient.
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        step = parameter.grad / (parameter.grad.abs() + config.eps)
        kept = 1 - config.base_lr * (0.1 if name == "weight" else 0.0)
        expected = before[name] * kept - config.base_lr * step
        torch.testing.assert_close(parameter.detach(), expected)
