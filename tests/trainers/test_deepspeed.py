"""The DeepSpeed configuration of a plan, its raw block, and what `precision: auto` comes to."""

from __future__ import annotations

import logging
import pkgutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn

from mimray.trainers.config.deepspeed_block import REFUSED, SECTIONS
from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.config.run import resolve
from mimray.trainers.engine.deepspeed import choose_precision, deepspeed_config, initialize
from mimray.trainers.engine.deepspeed_keys import check_known
from mimray.trainers.errors import ConfigError
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.models.blocks import checkpoint_activations
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


def test_config__raw_block_adds_key_by_key() -> None:
    raw = "engine.deepspeed={zero_optimization: {overlap_comm: true}, steps_per_print: 5}"
    config = config_of(raw, "engine.zero_stage=2", "optim.clip_grad_norm=0.5")
    assert config["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert config["steps_per_print"] == 5
    assert config["gradient_clipping"] == 0.5


@pytest.mark.parametrize(
    ("block", "cure"),
    [
        ("gradient_accumulation_steps: 2", "set optim.batch_size"),
        ("train_batch_size: 3", "set optim.batch_size"),
        ("train_micro_batch_size_per_gpu: auto", "engine.micro_batch_size"),
        ("gradient_clipping: 1.0", "set optim.clip_grad_norm"),
        ("bf16: {enabled: true}", "set engine.precision"),
        ("bfloat16: {enabled: true}", "set engine.precision"),
        ("fp16: {enabled: true, loss_scale: 2}", "set engine.precision"),
        ("torch_autocast: {enabled: true, dtype: bf16}", "set engine.precision"),
        ("data_types: {grad_accum_dtype: bf16}", "set engine.precision"),
        ("zero_optimization: {stage: 2}", "set engine.zero_stage"),
        ("zero_optimization: {offload_optimizer: {device: cpu}}", "set engine.offload"),
        ("zero_optimization: {cpu_offload: true}", "set engine.offload"),
        ("optimizer: {type: Lamb}", "the recipe's optim section"),
        ("scheduler: {type: WarmupLR}", "the recipe's optim section"),
        ("compile: {deepcompile: true}", "set engine.compile"),
        ("activation_checkpointing: {profile: true}", "set engine.activation_checkpointing"),
        ("checkpoint: {load_universal: true}", "checkpoint section"),
        ("fp16: {hysteresis: 2}", "without effect with engine.precision fp32"),
        ("zero_optimization: true", "is true: it is a section"),
        ("zero_optimization: null", "is null: it is a section"),
        ("zero_optimization: []", r"is \[\]: it is a section"),
        ("bf16: true", "is true: it is a section"),
        ("fp16: true", "is true: it is a section"),
        ("flops_profiler: true", "is true: it is a section"),
        ("comms_logger: null", "is null: it is a section"),
        ("timers: 1", "is 1: it is a section"),
        ("wandb: 2020-01-01", 'is "2020-01-01": it is a section'),
        ("steps_per_print: null", "is null: leave it out"),
        ("zero_optimization: {overlap_comm: null}", "is null: leave it out"),
    ],
)
def test_raw_block__refuses_what_the_recipe_has_a_key_for(block: str, cure: str) -> None:
    key = block.split(":")[0]
    with pytest.raises(ConfigError, match=f"engine.deepspeed.{key}.*{cure}") as refused:
        config_of(f"engine.deepspeed={{{block}}}")
    assert "\n" not in str(refused.value)


def test_raw_block__names_every_refused_key_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        config_of("engine.deepspeed={optimizer: {}, zero_optimization: {stage: 0}}")
    assert "'engine.deepspeed.optimizer'" in str(refused.value)
    assert "'engine.deepspeed.zero_optimization.stage'" in str(refused.value)


@pytest.mark.parametrize(
    ("block", "named"),
    [
        ("overlap_comm: true", "unknown key 'overlap_comm'"),
        ("zero_optimization: {overlap_com: true}", "unknown key 'zero_optimization.overlap_com'"),
        (
            "zero_optimization: {overlap_comm: banana}",
            "'zero_optimization.overlap_comm' is 'banana'",
        ),
        ("flops_profiler: {enable: true}", "unknown key 'flops_profiler.enable'"),
        ("comms_logger: {enable: true}", "unknown key 'comms_logger.enable'"),
        ("wandb: {enable: true}", "unknown key 'wandb.enable'"),
        ("timers: {throughputs: {}}", "unknown key 'timers.throughputs'"),
        ("communication_data_type: fp8", "Invalid communication_data_type"),
        ("nebula: {}", "removed"),
    ],
)
def test_raw_block__refuses_what_deepspeed_does_not_know(block: str, named: str) -> None:
    recipe = load_recipe("mae-tiny", [f"engine.deepspeed={{{block}}}"])
    with pytest.raises(ConfigError, match=named) as refused:
        check_known(resolve(recipe, FACTS, 2))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "block",
    [
        "zero_optimization: {reduce_bucket_size: 1000, overlap_comm: true}",
        "communication_data_type: bf16, steps_per_print: 5, wall_clock_breakdown: true",
        "flops_profiler: {enabled: true, profile_step: 2}, comms_logger: {enabled: true}",
        "tensorboard: {enabled: false, output_path: here}",
        *(f"{section}: {{}}" for section in SECTIONS if section not in ("bf16", "fp16")),
    ],
)
def test_raw_block__takes_what_deepspeed_knows(block: str) -> None:
    recipe = load_recipe("mae-tiny", [f"engine.deepspeed={{{block}}}"])
    check_known(resolve(recipe, FACTS, 2))


@pytest.mark.parametrize(
    ("name", "is_of_configuration"),
    [
        ("builtins.ValueError", True),
        ("builtins.TypeError", True),
        ("builtins.AssertionError", True),
        ("deepspeed.runtime.config.DeepSpeedConfigError", True),
        ("torch.OutOfMemoryError", False),
        ("torch.distributed.DistBackendError", False),
        ("builtins.OSError", False),
    ],
)
def test_raw_block__is_blamed_for_errors_of_configuration_alone(
    name: str, is_of_configuration: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = pkgutil.resolve_name(name)("it failed\nhere")

    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr("deepspeed.initialize", fail)
    recipe = load_recipe("mae-tiny", ["engine.deepspeed={steps_per_print: 5}"])

    with pytest.raises(Exception, match="it failed") as caught:
        initialize(build_method(recipe), resolve(recipe, FACTS, 1), "fp32")

    if is_of_configuration:
        assert isinstance(caught.value, ConfigError)
        assert caught.value.on_every_rank
        assert "\n" not in str(caught.value)
    else:
        assert caught.value is error


def test_raw_block__its_check_leaves_the_level_of_logs_as_it_was() -> None:
    recipe = load_recipe("mae-tiny", ["engine.deepspeed={steps_per_print: 5}"])
    logging.disable(logging.ERROR)
    try:
        check_known(resolve(recipe, FACTS, 2))
        assert logging.root.manager.disable == logging.ERROR
    finally:
        logging.disable(logging.NOTSET)


def test_raw_block__every_refused_key_is_known_to_deepspeed_or_was() -> None:
    """The refused keys exist, so that a renamed one does not slip through."""
    import deepspeed
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = {key for key in REFUSED if key.startswith("zero_optimization.")}
    fields = DeepSpeedZeroConfig.model_fields
    assert {key.split(".")[1] for key in zero} <= set(fields) | {"load_from_fp32_weights"}
    source = Path(deepspeed.__file__).parent
    text = "".join(p.read_text() for p in source.glob("runtime/**/*.py")) + "".join(
        p.read_text() for p in source.glob("datastates/*.py")
    )
    for key in REFUSED.keys() - zero:
        assert key.split(".")[-1] in text, key


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("engine.zero_stage=0", "engine.offload=optimizer"), "needs engine.zero_stage 1, 2 or 3"),
        (("engine.zero_stage=0", "engine.offload=all"), "needs engine.zero_stage 1, 2 or 3"),
        (("engine.zero_stage=2", "engine.offload=all"), "needs engine.zero_stage 3, not 2"),
        (("engine.offload=disk",), "'engine.offload' is 'disk'"),
        (("engine.zero_stage=0", "engine.precision=bf16_weights"), "--set engine.zero_stage=1"),
        (("engine.zero_stage=0", "engine.precision=fp16"), "--set engine.zero_stage=1"),
    ],
)
def test_engine__refuses_a_stage_that_cannot(settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(*settings)


def test_engine__of_an_earlier_version_can_still_be_read() -> None:
    """A bundle's recipe must load, whatever a run may no longer begin with."""
    sets = ["engine.zero_stage=0", "engine.precision=fp16", "engine.deepspeed={optimizer: {}}"]
    assert load_recipe("mae-tiny", sets).engine.deepspeed == {"optimizer": {}}


def test_offload__is_deepspeeds() -> None:
    zero = config_of("engine.zero_stage=3", "engine.offload=all")["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "cpu"
    zero = config_of("engine.zero_stage=1", "engine.offload=optimizer")["zero_optimization"]
    assert zero == {"stage": 1, "offload_optimizer": {"device": "cpu"}}


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


def test_activation_checkpointing__same_loss_and_gradients__each_block_runs_again() -> None:
    torch.manual_seed(0)
    method = build_method(load_recipe("mae-tiny")).train()
    images, mask = torch.randn(2, 3, 64, 64), torch.rand(1, 64).argsort().repeat(2, 1) < 48
    blocks = [m for m in method.modules() if isinstance(m, Block)]
    assert len(blocks) == 5, "four of the encoder and one of the decoder"
    calls = Counter[nn.Module]()
    for block in blocks:
        block.register_forward_pre_hook(lambda block, _: calls.update([block]))
    found = []
    for wanted in (False, True, False):
        calls.clear()
        checkpoint_activations(method, wanted)
        method.zero_grad()
        loss = method(images, mask).loss
        loss.backward()
        gradients = [p.grad.clone() for p in method.parameters() if p.grad is not None]
        found.append((loss.detach(), gradients))
        assert [calls[block] for block in blocks] == [2 if wanted else 1] * len(blocks)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
