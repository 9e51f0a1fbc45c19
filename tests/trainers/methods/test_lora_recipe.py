"""Adapters in a recipe: what is refused, the plan, and what they cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.config.run import differences, essential, resolve
from mimray.trainers.cost import estimate
from mimray.trainers.cost.step import shape_of
from mimray.trainers.engine.optim import check_trained
from mimray.trainers.errors import ConfigError
from mimray.trainers.methods.needs import with_needs
from mimray.trainers.types import DatasetFacts
from tests.trainers.methods.lora_cases import plan_of


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
