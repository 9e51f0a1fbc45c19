"""Keys of a raw DeepSpeed block that belong to the recipe, or that would be without effect.

Keys that DeepSpeed itself does not know are refused by `engine/deepspeed_keys.py`, which asks it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from mimray.trainers.errors import ConfigError

_BATCH = "set optim.batch_size, engine.micro_batch_size and resources.num_workers"
_PRECISION = "set engine.precision"
_OFFLOAD = "set engine.offload"
_OPTIM = "the recipe's optim section sets the optimiser and its schedule"
_LOADER = "without effect on mimray's loader; see the recipe's data section"
_FILES = "checkpoints are mimray's own; see the recipe's checkpoint section"
_SHARDED = "mimray shards by ZeRO alone; set engine.zero_stage"

REFUSED: dict[str, str] = {
    "train_batch_size": _BATCH,
    "train_micro_batch_size_per_gpu": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "managed_gradient_accumulation": _BATCH,
    "gradient_clipping": "set optim.clip_grad_norm",
    "gradient_allreduce_op": "gradients are means over the global batch; set optim.base_lr",
    "optimizer": _OPTIM,
    "scheduler": _OPTIM,
    "zero_allow_untested_optimizer": _OPTIM,
    "zero_force_ds_cpu_optimizer": _OFFLOAD,
    "torch_autocast": _PRECISION,
    "amp": _PRECISION,
    "bfloat16": _PRECISION,
    "data_types": _PRECISION,
    "bf16.enabled": _PRECISION,
    "bf16.bf16_master_weights_and_grads": "master weights are always fp32; " + _PRECISION,
    "bf16.bf16_optimizer_states": "the optimiser's states are always fp32; " + _PRECISION,
    "fp16.enabled": _PRECISION,
    "fp16.auto_cast": _PRECISION,
    "fp16.fp16_master_weights_and_grads": "master weights are always fp32; " + _PRECISION,
    "zero_optimization.stage": "set engine.zero_stage",
    "zero_optimization.offload_optimizer": _OFFLOAD,
    "zero_optimization.offload_param": _OFFLOAD,
    "zero_optimization.cpu_offload": _OFFLOAD,
    "zero_optimization.cpu_offload_param": _OFFLOAD,
    "zero_optimization.cpu_offload_use_pin_memory": _OFFLOAD,
    "zero_optimization.zenflow": _OFFLOAD,
    "zero_optimization.elastic_checkpoint": _FILES,
    "zero_optimization.load_from_fp32_weights": _FILES,
    "zero_optimization.pipeline_loading_checkpoint": _FILES,
    "activation_checkpointing": "set engine.activation_checkpointing",
    "checkpoint": _FILES,
    "datastates_ckpt": _FILES,
    "compile": "set engine.compile",
    "aio": "without effect, since nothing is offloaded to disks; leave it out",
    "dataloader_drop_last": _LOADER,
    "data_efficiency": _LOADER,
    "curriculum_learning": _LOADER,
    "pipeline": _SHARDED,
    "tensor_parallel": _SHARDED,
    "expert_parallel": _SHARDED,
    "sequence_parallel_size": _SHARDED,
    "seq_parallel_communication_data_type": _SHARDED,
    "use_data_before_expert_parallelism": _SHARDED,
    "autotuning": "`mimray tune` searches settings",
    "elasticity": "a run continues on any number of workers; set resources.num_workers",
    "hybrid_engine": "for generation of text alone; leave it out",
    "weight_quantization": "for inference alone; leave it out",
    "vocabulary_size": "for language models alone; leave it out",
    "disable_allgather": "without effect in DeepSpeed; leave it out",
}
"""The cure by dotted key. Blocks named as a whole are refused with whatever is in them."""

SECTIONS = (
    "zero_optimization",
    "bf16",
    "fp16",
    "comms_logger",
    "flops_profiler",
    "timers",
    "comet",
    "csv_monitor",
    "tensorboard",
    "wandb",
)
"""Keys that hold keys. A value in the place of a section would replace the whole of ours."""


def check_block(block: Mapping[str, Any], precision: str) -> None:
    """Refuse keys that contradict the recipe's own, or that no training would notice.

    A section that is none, and values that are null, are refused too.

    Args:
        block: the recipe's `engine.deepspeed`.
        precision: the recipe's `engine.precision`.

    Raises:
        ConfigError: names every such key and the recipe's key in its place.
    """
    problems = [f"'engine.deepspeed.{key}': {REFUSED[key]}" for key in _refused(block)]
    problems += [
        f"'engine.deepspeed.{key}' is {json.dumps(block[key], default=str)}: it is a section, "
        "of keys and values"
        for key in SECTIONS
        if key in block and not isinstance(block[key], Mapping)
    ]
    problems += [
        f"'engine.deepspeed.{key}' is null: leave it out for DeepSpeed's default"
        for key in _nulls(block)
        if key not in (*REFUSED, *SECTIONS)
    ]
    for part, owner in (("bf16", "bf16_weights"), ("fp16", "fp16")):
        if part in block and not problems and precision != owner:
            problems.append(
                f"'engine.deepspeed.{part}' is without effect with engine.precision {precision}: "
                f"it is for {owner}"
            )
    if problems:
        raise ConfigError("; ".join(problems))


def _refused(block: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in block.items():
        dotted = f"{prefix}{key}"
        if dotted in REFUSED:
            yield dotted
        elif isinstance(value, Mapping):
            yield from _refused(value, f"{dotted}.")


def _nulls(block: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in block.items():
        if value is None:
            yield f"{prefix}{key}"
        elif isinstance(value, Mapping):
            yield from _nulls(value, f"{prefix}{key}.")
