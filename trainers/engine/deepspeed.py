"""DeepSpeed: from a plan to an engine, and from an engine back to whole fp32 weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mimray.trainers.config.run import Plan
from mimray.trainers.engine.optim import build_optimizer
from mimray.trainers.errors import ConfigError

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(wanted: str, device: torch.device) -> str:
    """What the run computes in.

    `auto` is bf16 where the device multiplies in it: GPUs from Ampere on, CPUs with
    AVX512-BF16 or AMX. Elsewhere bf16 is emulated, hundreds of times slower than fp32.

    Args:
        wanted: auto, fp32, bf16 or fp16.
        device: the worker's device.

    Raises:
        ConfigError: fp16 on a CPU.
    """
    if wanted == "fp16":
        if device.type == "cpu":
            raise ConfigError(
                "engine.precision fp16 needs a GPU", hint="--set engine.precision=auto"
            )
        logger.warning("fp16 overflows easily in masked image modelling; prefer bf16")
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    cpu: Any = torch.cpu  # the probes have no public name yet
    return "bf16" if cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported() else "fp32"


def deepspeed_config(plan: Plan, precision: str) -> dict[str, Any]:
    """The DeepSpeed configuration of a plan.

    Every default that changed between releases is set explicitly: clipping (1.0 since 0.19)
    and the check of bf16 gradients. The recipe's raw block overrides ours key by key.

    Args:
        plan: batch sizes, ZeRO stage, clipping.
        precision: fp32, bf16 or fp16.
    """
    engine, optim = plan.recipe.engine, plan.recipe.optim
    ours: dict[str, Any] = {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": optim.clip_grad_norm or 0.0,
        "zero_optimization": {"stage": engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": False},
        "fp16": {"enabled": precision == "fp16"},
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    return _merge(ours, engine.deepspeed)


def prepare_process(device: torch.device) -> None:
    """Set what DeepSpeed reads from the environment; before it is imported for the first time."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    # Ray sets it; a process group made by hand does not, and DeepSpeed insists.
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    if device.type == "cpu":
        # Compiled on first use for inference only; without a compiler it is a hard failure.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.logger.setLevel(logging.WARNING)


def initialize(method: nn.Module, plan: Plan, precision: str) -> Any:
    """Wrap a method in a DeepSpeed engine.

    Args:
        method: on the host, fp32, the same weights on every rank.
        plan: what to run.
        precision: as `choose_precision` says.

    Returns:
        The engine: `engine(images, mask)`, `engine.backward(loss)`, `engine.step()`.
    """
    import deepspeed

    config = deepspeed_config(plan, precision)
    optimizer = build_optimizer(method, plan.recipe.optim)
    engine, *_ = deepspeed.initialize(model=method, optimizer=optimizer, config=config)
    return engine


def full_state(engine: Any, frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole fp32 weights of the engine's module, whatever the stage and precision.

    Collective under ZeRO: every rank calls it, every rank gets the result.

    Args:
        engine: from `initialize`.
        frozen: values of parameters that are not trained, which bf16 would have rounded.

    Returns:
        A state on the host, by the module's own names.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    state: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            state[name] = frozen[name].clone()
            continue
        value = safe_get_full_fp32_param(parameter)
        if value is None:  # no optimiser wrapper: the parameter itself is the fp32 master
            value = parameter.detach()
        state[name] = value.detach().float().cpu().clone().reshape(_shape(parameter))
    kept = engine.module.state_dict().keys()  # buffers that are made anew are not among them
    for name, buffer in engine.module.named_buffers():
        if name in kept:
            state[name] = buffer.detach().float().cpu().clone()
    return state


def _shape(parameter: nn.Parameter) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _merge(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged
