"""Moving averages of an encoder with adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mimray.trainers.config.run import Recipe
from mimray.trainers.config.schedule import Schedule
from mimray.trainers.engine.average import chosen_weights, with_average
from mimray.trainers.engine.deepspeed import (
    fixed_weights,
    follow,
    full_state,
    initialize,
)
from mimray.trainers.methods.base import Method
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.methods.lora import adapt, merged
from mimray.trainers.models import build_encoder
from mimray.trainers.models.averages import MovingAverages
from tests.trainers.methods.lora_cases import adapted, moved, plan_of


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
