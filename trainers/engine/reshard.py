"""Resharding: ZeRO checkpoints for another number of workers, by DeepSpeed's universal format.

DeepSpeed itself loads ZeRO shards only into as many ranks as wrote them. Its universal format
holds every parameter and moment whole; each rank cuts out the part it owns. DeepSpeed 0.19 silently
restores some of the state wrongly; `_repair` corrects it.
"""

from __future__ import annotations

import io
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from mimray.trainers.engine.deepspeed import Engine
from mimray.trainers.errors import StorageError
from mimray.trainers.storage import storage_errors


def convert(shards: Path, folder: Path) -> None:
    """Convert a ZeRO checkpoint to the universal format.

    Needs about 24 bytes of disk per parameter meanwhile, of which 12 remain.

    Args:
        shards: the folder of the files that `engine.save_checkpoint` wrote.
        folder: the folder of the result; must not exist.

    Raises:
        StorageError: the result could not be written.
    """
    from deepspeed.checkpoint.ds_to_universal import main

    options = Namespace(
        input_folder=str(shards),
        output_folder=str(folder),
        # In this process: a worker has threads and a process group, and must not fork.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # metadata that only Megatron's models have
    )
    progress = io.StringIO()  # swallows hundreds of prints and progress bars
    with storage_errors(str(folder)), redirect_stdout(progress), redirect_stderr(progress):
        folder.mkdir(parents=True)
        try:
            main(options)
        except RuntimeError as error:  # torch's zip writer hides the errno
            raise StorageError(
                f"{folder}: {str(error).splitlines()[0]}",
                hint="is the disk full? point TMPDIR to one with room for twice the checkpoint",
            ) from error


def load(engine: Engine, folder: Path, tag: str) -> None:
    """Load a universal checkpoint; collective.

    Frozen parameters are left as they are, since they follow from the recipe.

    Args:
        engine: the DeepSpeed engine, ZeRO 1-3.
        folder: the directory above the converted one.
        tag: name of the converted directory.
    """
    groups = engine.optimizer.param_groups
    ours = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    # Documented as a setting of the whole engine, but read only at each load. It is set here,
    # because the need for it is known only once a checkpoint has been chosen.
    config: Any = vars(engine)["_config"]
    config.load_universal_checkpoint = True
    try:
        engine.load_checkpoint(str(folder), tag=tag)
    finally:
        config.load_universal_checkpoint = False
    _repair(engine, ours)
    _load_buffers(engine, folder / tag)


def _repair(engine: Engine, hyperparameters: list[dict[str, Any]]) -> None:
    for group, ours in zip(engine.optimizer.param_groups, hyperparameters, strict=True):
        group.update(ours)  # ZeRO 3 gives the first group's to all groups: biases would decay
    for parameter, state in engine.optimizer.optimizer.state.items():
        # ZeRO 3 gives all groups one counter, which then counts the updates of each of them; and
        # fused AdamW requires it on the parameter's device.
        state["step"] = torch.as_tensor(state["step"]).to(parameter.device, copy=True)


def _load_buffers(engine: Engine, folder: Path) -> None:
    """Load buffers from any rank's file, where they are whole; the universal format has none."""
    file = min(folder.glob("*model_states.pt"))
    # Written by DeepSpeed in this run's own directory; holds more than tensors.
    saved = torch.load(file, map_location="cpu", weights_only=False)["module"]
    for name, buffer in engine.module.named_buffers():
        if name in saved:  # all but buffers that are not persistent
            buffer.data.copy_(saved[name])
