"""The DeepSpeed configuration of a plan, and what `precision: auto` comes to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.config.run import resolve
from mimray.trainers.engine.deepspeed import choose_precision, deepspeed_config
from mimray.trainers.errors import ConfigError
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.types import DatasetFacts

CPU = torch.device("cpu")
FACTS = DatasetFacts("pictures", 1000, "f" * 64)


def config_of(*overrides: str, world_size: int = 1, precision: str = "fp32") -> dict[str, Any]:
    plan = resolve(load_recipe("mae-tiny", overrides), FACTS, world_size)
    return deepspeed_config(plan, precision)


def test_config__batch_arithmetic_and_explicit_defaults() -> None:
    config = config_of("optim.batch_size=64", "engine.micro_batch_size=8", world_size=2)
    assert config["train_batch_size"] == 64
    assert config["train_micro_batch_size_per_gpu"] == 8
    assert config["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 0.0  # DeepSpeed's own default clips at 1
    assert config["bf16"]["check_grad_overflow"] is False


def test_config__raw_block_overrides_key_by_key() -> None:
    raw = "engine.deepspeed={zero_optimization: {overlap_comm: true}, steps_per_print: 5}"
    config = config_of(raw, "engine.zero_stage=2", "optim.clip_grad_norm=0.5")
    assert config["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert config["steps_per_print"] == 5
    assert config["gradient_clipping"] == 0.5


@pytest.mark.parametrize(
    ("bf16", "amx", "wanted"),
    [(False, False, "fp32"), (True, False, "bf16"), (False, True, "bf16")],
)
def test_auto__bf16_on_a_cpu_only_where_it_is_native(
    monkeypatch: pytest.MonkeyPatch, bf16: bool, amx: bool, wanted: str
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert choose_precision("auto", CPU) == wanted
    assert choose_precision("fp32", CPU) == "fp32"


def test_fp16__refused_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        choose_precision("fp16", CPU)


def test_activation_checkpointing__same_loss_and_gradients() -> None:
    torch.manual_seed(0)
    method = build_method(load_recipe("mae-tiny")).train()
    images, mask = torch.randn(2, 3, 64, 64), torch.rand(1, 64).argsort().repeat(2, 1) < 48
    found = []
    for wanted in (False, True):
        method.encoder.activation_checkpointing = wanted
        method.zero_grad()
        loss = method(images, mask).loss
        loss.backward()
        gradients = [p.grad.clone() for p in method.parameters() if p.grad is not None]
        found.append((loss.detach(), gradients))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
