"""DeepSpeed: from a plan to an engine, and from an engine back to whole fp32 weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mimray.trainers.config.run import Plan
from mimray.trainers.engine.optim import build_optimizer
from mimray.trainers.errors import ConfigError
from mimray.trainers.methods.base import Method
from mimray.trainers.types import MethodOutput

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """A method, its optimiser and its gradients, over all workers; what DeepSpeed makes of them.

    Attributes:
        module: the method, in the precision that the run computes in.
        optimizer: torch's, or ZeRO's around it; its `param_groups` are those of `optim`.
    """

    module: Method
    optimizer: Any

    def __call__(self, **arguments: Tensor) -> MethodOutput:
        """The method's `forward`."""

    def train(self, mode: bool = True) -> Any:
        """Switch to training."""

    def eval(self) -> Any:
        """Switch to evaluation."""

    def backward(self, loss: Tensor) -> Any:
        """Add the gradients of a micro batch."""

    def step(self) -> Any:
        """Update the weights, at the last micro batch of a step."""

    def is_gradient_accumulation_boundary(self) -> bool:
        """True at the last micro batch of a step."""

    def was_step_applied(self) -> bool:
        """True if the last step updated weights; fp16 skips those whose gradients overflow."""

    def get_global_grad_norm(self) -> float | None:
        """Norm of the last update's gradients, where ZeRO has computed it."""

    def zero_optimization(self) -> bool:
        """True at ZeRO stages 1 to 3."""

    def save_checkpoint(self, folder: str, *, tag: str, save_latest: bool) -> Any:
        """Write this rank's files; collective."""

    def load_checkpoint(self, folder: str, *, tag: str) -> Any:
        """Read this rank's files; collective."""


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


def initialize(method: nn.Module, plan: Plan, precision: str) -> Engine:
    """Wrap a method in a DeepSpeed engine.

    Args:
        method: on the host, fp32, the same weights on every rank.
        plan: what to run.
        precision: as `choose_precision` says.

    Returns:
        The engine.
    """
    import deepspeed

    config = deepspeed_config(plan, precision)
    optimizer = build_optimizer(method, plan.recipe.optim)
    engine: Engine
    engine, *_ = deepspeed.initialize(model=method, optimizer=optimizer, config=config)
    return engine


def master_weights(engine: Engine, names: Collection[str] = ("",)) -> Iterator[tuple[str, Tensor]]:
    """The fp32 weights that the optimiser works on, whole, one trained parameter at a time.

    Collective under ZeRO: every rank asks for all of them, in the same order.

    Args:
        engine: from `initialize`, at any stage and precision.
        names: beginnings of the names of those that are wanted.

    Yields:
        Names in the module, and tensors on the device that may be those of the optimiser: they are
        to be read only, and before the next one is asked for.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    unsharded = _unsharded_masters(engine)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad or not name.startswith(tuple(names)):
            continue
        value = safe_get_full_fp32_param(parameter)
        if value is None:  # without ZeRO
            value = unsharded.get(parameter, parameter)
        yield name, value.detach().reshape(_shape(parameter))


def _unsharded_masters(engine: Engine) -> dict[Tensor, Tensor]:
    """fp32 weights by parameter, where ZeRO is off; none in fp32, which needs no copies."""
    optimizer = engine.optimizer
    if engine.zero_optimization() or not hasattr(optimizer, "fp32_groups"):
        return {}
    return {
        parameter: master
        for parameters, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        for parameter, master in zip(parameters, masters, strict=True)
    }


def follow(engine: Engine, momentum: float) -> None:
    """Move a method's averages one step after what they follow; collective under ZeRO.

    Args:
        engine: whose method has averages.
        momentum: of this step.
    """
    averages = engine.module.averages
    assert averages is not None
    followed = tuple(f"{name}." for name in averages.names)
    averages.update(master_weights(engine, followed), momentum)
    # Those that a lower precision has rounded are constants; the averages have them whole.
    exact = dict(averages.named_buffers())
    averages.update(
        (
            (name, buffer)
            for name, buffer in engine.module.named_buffers()
            if name.startswith(followed) and buffer.dtype == exact[name].dtype
        ),
        momentum=0.0,
    )


def fixed_weights(method: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that are not trained, which a lower precision would round."""
    return {n: p.detach().clone() for n, p in method.named_parameters() if not p.requires_grad}


def full_state(engine: Engine, fixed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole fp32 weights of the engine's module, whatever the stage and precision.

    Collective under ZeRO: every rank calls it, every rank gets the result.

    Args:
        engine: from `initialize`.
        fixed: of `fixed_weights`, from before the engine was made.

    Returns:
        A state on the host, by the module's own names: the optimiser's weights, the fixed ones as
        they were, and buffers, moving averages among them.
    """
    trained = {n: v.float().cpu().clone() for n, v in master_weights(engine)}
    state: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        state[name] = trained[name] if parameter.requires_grad else fixed[name].cpu().clone()
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
