"""Shards of one number of workers, loaded by another: DeepSpeed's universal format between them.

DeepSpeed itself loads ZeRO shards only into as many ranks as wrote them. Its universal format
holds every parameter and moment whole; each rank cuts out what it owns. What DeepSpeed 0.19
gets wrong on that way, silently, is put right in `_repair`.
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
    """Write the universal form of a ZeRO checkpoint.

    Takes disk of about 24 bytes a parameter while at work, and leaves 12.

    Args:
        shards: the files that `engine.save_checkpoint` wrote.
        folder: to be made; the result.

    Raises:
        StorageError: it could not be written.
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
        inject_missing_state=True,  # what only Megatron's models say of themselves
    )
    progress = io.StringIO()  # prints and progress bars, by the hundred
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

    Frozen parameters are left as the engine has them, for they follow from the recipe.

    Args:
        engine: the DeepSpeed engine, ZeRO 1-3.
        folder: the directory above the converted one.
        tag: name of the converted directory.
    """
    groups = engine.optimizer.param_groups
    ours = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    # A setting of the whole engine by its documentation, but read at each load only. Whether it
    # is needed is known when a checkpoint has been chosen, and not to every engine.
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
        group.update(ours)  # ZeRO 3 gives those of the first group to all: biases would decay
    for parameter, state in engine.optimizer.optimizer.state.items():
        # ZeRO 3 hands one counter to all groups, which then count each other's updates; and
        # fused AdamW wants it where the parameter is.
        state["step"] = torch.as_tensor(state["step"]).to(parameter.device, copy=True)


def _load_buffers(engine: Engine, folder: Path) -> None:
    """The universal format knows parameters only; buffers are whole in any rank's file."""
    file = min(folder.glob("*model_states.pt"))
    # Written by DeepSpeed in this run's own directory; holds more than tensors.
    saved = torch.load(file, map_location="cpu", weights_only=False)["module"]
    for name, buffer in engine.module.named_buffers():
        if name in saved:  # not those that are computed anew
            buffer.data.copy_(saved[name])
