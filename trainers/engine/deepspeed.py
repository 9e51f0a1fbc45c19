"""DeepSpeed: its configuration, the engine of a plan, and whole fp32 weights of an engine."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mimray.trainers.config.run import Plan
from mimray.trainers.engine.optim import build_optimizer
from mimray.trainers.errors import ConfigError
from mimray.trainers.methods.base import Method
from mimray.trainers.models.averages import MovingAverages
from mimray.trainers.types import MethodOutput

logger = logging.getLogger(__name__)

_LINEAR = nn.functional.linear


class Engine(Protocol):
    """DeepSpeed's engine: a method with its optimiser and gradients, over all workers.

    Attributes:
        module: the method, with weights in the run's `DTYPES`.
        optimizer: torch's optimiser, or ZeRO's around it, with the `param_groups` of `optim`.
    """

    module: Method
    optimizer: Any

    def __call__(self, **arguments: Tensor) -> MethodOutput:
        """Call the method's `forward`."""

    def train(self, mode: bool = True) -> Any:
        """Switch the method to training mode."""

    def eval(self) -> Any:
        """Switch the method to evaluation mode."""

    def backward(self, loss: Tensor) -> Any:
        """Add the gradients of a micro batch's loss."""

    def step(self) -> Any:
        """Update the weights, at the last micro batch of a step."""

    def is_gradient_accumulation_boundary(self) -> bool:
        """True at the last micro batch of a step."""

    def was_step_applied(self) -> bool:
        """True if the last step updated the weights; fp16 skips steps whose gradients overflow."""

    def get_global_grad_norm(self) -> float | None:
        """Norm of the last update's gradients; None if DeepSpeed has not computed it."""

    def zero_optimization(self) -> bool:
        """True at ZeRO stages 1 to 3."""

    def save_checkpoint(self, folder: str, *, tag: str, save_latest: bool) -> Any:
        """Write this rank's files; collective."""

    def load_checkpoint(self, folder: str, *, tag: str) -> Any:
        """Read this rank's files; collective."""


DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.float32,
    "bf16_weights": torch.bfloat16,
    "fp16": torch.float16,
}
"""The weights' data type by precision."""

AUTOCAST = {"bf16": torch.bfloat16}
"""The data type of products and convolutions by precision, where it is not the weights'."""


def choose_precision(wanted: str, device: torch.device) -> str:
    """Precision of a run on a device, one of `DTYPES`.

    `auto` is bf16 on devices that multiply in it: GPUs from Ampere on, CPUs with AVX512-BF16 or
    AMX; fp32 on others, where bf16 is emulated, hundreds of times slower than fp32.

    Args:
        wanted: the recipe's `engine.precision`.
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
    and the check of bf16 gradients. The recipe's `engine.deepspeed` adds to ours key by key.

    DeepSpeed knows bf16 as its weights' data type alone. Its `torch_autocast` is not used: it
    reduces gradients in bf16, and it is a property of the process, which the next trial of a sweep
    in the same process would inherit. `initialize` enters autocast instead.

    Args:
        plan: the run's plan; its batch sizes, ZeRO stage, offload and clipping count.
        precision: a result of `choose_precision`.
    """
    engine, optim = plan.recipe.engine, plan.recipe.optim
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if engine.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    ours: dict[str, Any] = {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": optim.clip_grad_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own AdamW for offloaded states needs a compiler; torch's fused one does not.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision == "bf16_weights", "check_grad_overflow": False},
        "fp16": {"enabled": precision == "fp16"},
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    return _merge(ours, engine.deepspeed)


@contextmanager
def _without_mlflow() -> Iterator[None]:
    """Have imports find no MLflow, unless it is there already.

    DeepSpeed's autotuner, which nothing here uses, imports it where it can: half of the time that
    importing DeepSpeed takes, in every worker.
    """
    if "mlflow" in sys.modules:
        yield
        return
    sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["mlflow"]


def prepare_process(device: torch.device) -> None:
    """Set up this process for DeepSpeed; must run before DeepSpeed is first imported.

    Args:
        device: the worker's device.
    """
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    # DeepSpeed requires LOCAL_RANK. Ray sets it; a process group made by hand does not.
    os.environ.setdefault("LOCAL_RANK", "0")
    with _without_mlflow():
        import deepspeed

    if device.type == "cpu":
        # An extension for inference only, compiled on first use, which fails without a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.logger.setLevel(logging.WARNING)


def smaller_group(count: int, timeout_s: float) -> bool:
    """Take the default process group apart, and make one of its first ranks; collective.

    Args:
        count: the number of ranks that stay.
        timeout_s: the time limit of collectives.

    Returns:
        False on a rank that is in no group any more.
    """
    rank, backend = dist.get_rank(), dist.get_backend()
    place: list[str | None] = [None]
    if rank == 0:
        with socket.socket() as found:
            found.bind(("", 0))
            host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), found.getsockname()[1]
        place[0] = f"tcp://{host}:{port}"
    dist.broadcast_object_list(place, src=0)
    dist.destroy_process_group()
    if rank >= count:
        return False
    dist.init_process_group(
        backend, init_method=place[0], rank=rank, world_size=count,
        timeout=timedelta(seconds=timeout_s),
    )  # fmt: skip
    os.environ["WORLD_SIZE"] = str(count)
    return True


def initialize(method: nn.Module, plan: Plan, precision: str) -> Engine:
    """Wrap a method in a DeepSpeed engine.

    Args:
        method: the method, on the host, in fp32, with the same weights on every rank.
        plan: the run's plan.
        precision: a result of `choose_precision`.

    Raises:
        ConfigError: DeepSpeed does not start with the recipe's raw block.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.config import DeepSpeedConfigError

    config = deepspeed_config(plan, precision)
    optimizer = build_optimizer(method, plan.recipe.optim)
    # Stage 3 replaces it for the whole process, so that the next run in it would differ in bits.
    nn.functional.linear = _LINEAR
    if precision in AUTOCAST:
        # Within the module, as DeepSpeed switches off what is entered around its engine. Without
        # the cache of casts, which a first use without gradients would fill with constants.
        cast = torch.autocast(
            get_accelerator().device_name(), AUTOCAST[precision], cache_enabled=False
        )
        method.forward = cast(method.forward)
    engine: Engine
    try:
        engine, *_ = deepspeed.initialize(model=method, optimizer=optimizer, config=config)
    # Others, of memory or of the network, may pass when workers start again.
    except (ValueError, TypeError, AssertionError, DeepSpeedConfigError) as error:
        if not plan.recipe.engine.deepspeed:
            raise
        refused = ConfigError(
            f"DeepSpeed cannot start with engine.deepspeed {plan.recipe.engine.deepspeed}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else repr(error)}",
            hint="leave the block out, or the key that it names",
        )
        refused.on_every_rank = True
        raise refused from error
    return engine


def _every(name: str) -> bool:
    return True


def master_weights(
    engine: Engine, wanted: Callable[[str], bool] = _every
) -> Iterator[tuple[str, Tensor]]:
    """The optimiser's fp32 master weights, whole, one trained parameter at a time.

    Collective under ZeRO: every rank must consume all of them, in the same order.

    Args:
        engine: a result of `initialize`, at any ZeRO stage and precision.
        wanted: True for the names of the wanted parameters; all parameters by default.

    Yields:
        The parameter's name in the module, and a tensor on the device. It may be the optimiser's
        own, so it must only be read, and before the next one is taken.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad or not wanted(name):
            continue
        value = safe_get_full_fp32_param(parameter)
        if value is None:  # without ZeRO, where weights are always fp32
            value = parameter
        yield name, value.detach().reshape(_shape(parameter))


def follow(engine: Engine, averages: MovingAverages, momentum: float) -> None:
    """Update moving averages of a method by one step; collective under ZeRO.

    Args:
        engine: the engine of the method.
        averages: the method's `averages`, or its `ema`.
        momentum: the averages' momentum at this step.
    """
    averages.update(master_weights(engine, averages.follows), momentum)
    # Buffers of a lower precision are rounded constants, which the averages hold exactly.
    exact = dict(averages.named_buffers())
    averages.update(
        (
            (name, buffer)
            for name, buffer in engine.module.named_buffers()
            if averages.follows(name) and buffer.dtype == exact[name].dtype
        ),
        momentum=0.0,
    )


def fixed_weights(method: nn.Module) -> dict[str, Tensor]:
    """Copies of the untrained parameters, before a lower precision rounds them."""
    return {n: p.detach().clone() for n, p in method.named_parameters() if not p.requires_grad}


def full_state(
    engine: Engine, fixed: Mapping[str, Tensor], wanted: Callable[[str], bool] = _every
) -> dict[str, Tensor]:
    """Whole fp32 weights of an engine's module, at any ZeRO stage and precision.

    Collective under ZeRO; every rank gets the result.

    Args:
        engine: a result of `initialize`.
        fixed: the result of `fixed_weights` from before the engine was made.
        wanted: True for the names of the wanted weights; all by default. The same on every rank.

    Returns:
        A state on the host, by the module's own names: the optimiser's weights, the fixed ones
        unrounded, and persistent buffers, moving averages among them.
    """
    trained = {n: v.float().cpu().clone() for n, v in master_weights(engine, wanted)}
    state: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if wanted(name):
            state[name] = trained[name] if parameter.requires_grad else fixed[name].cpu().clone()
    kept = engine.module.state_dict().keys()  # without buffers that are not persistent
    for name, buffer in engine.module.named_buffers():
        if name in kept and wanted(name):
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
