"""Blocks of a method that torch compiles."""

from __future__ import annotations

import os
import shlex
import shutil

import torch
from torch import nn

from mimray.trainers.errors import ConfigError
from mimray.trainers.models.blocks import BlockRunner

# Encoder, teacher and decoder, with and without gradients, in training and not: a graph each.
_MOST_GRAPHS = 64


def compile_blocks(method: nn.Module, device: torch.device) -> None:
    """Have torch compile every chain of blocks of a method, when each is first called.

    A graph holds one block, with its checkpointing, and serves all that are alike and any number
    of tokens. Results change in their last digits.

    Args:
        method: the method, before the engine is made.
        device: the worker's device.

    Raises:
        ConfigError: torch cannot compile here, for lack of a compiler.
    """
    # Either may be a command with arguments, such as `ccache g++`.
    command = os.environ.get("CXX", "g++") if device.type == "cpu" else os.environ.get("CC", "gcc")
    compiler = shlex.split(command)[0]
    if shutil.which(compiler) is None:
        error = ConfigError(
            f"engine.compile: torch needs {compiler}, which is not here",
            hint="apt install g++ on every node, or --set engine.compile=false",
        )
        error.on_every_rank = True
        raise error
    torch._dynamo.config.recompile_limit = _MOST_GRAPHS  # beyond it, calls are not compiled
    for module in method.modules():
        if isinstance(module, BlockRunner):
            module.compiled = True
