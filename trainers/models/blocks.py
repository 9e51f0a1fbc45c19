"""Activation checkpointing and compilation of the blocks of a network."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class BlockRunner(nn.Module):
    """The base of networks that are a chain of blocks.

    Attributes:
        activation_checkpointing: True to compute activations again in the backward pass.
        compiled: True to have torch compile the blocks, one graph for all that are alike.
        num_tokens_varies: True if a block sees other numbers of tokens from call to call, as where
            hidden ones are left out; a graph then serves them all. In a network whose blocks
            differ in width and grid, torch would take that difference for one that varies.
    """

    activation_checkpointing: bool = False
    compiled: bool = False
    num_tokens_varies: bool = False

    def _run(self, block: nn.Module, *inputs: object) -> Tensor:
        """Call a block.

        Args:
            block: a part of the network.
            inputs: what it takes: tokens [B, N, D] or maps [B, D, h, w], and its positions.
        """
        call = _compiled_call(self.num_tokens_varies) if self.compiled else _call
        again = self.activation_checkpointing and self.training
        return cast(Tensor, call(block, again, *inputs))


def checkpoint_activations(network: nn.Module, on: bool = True) -> None:
    """Have all chains of blocks in a network compute activations again in the backward pass.

    Args:
        network: a network, such as a method with its encoder and decoder.
        on: False to keep activations.
    """
    for module in network.modules():
        if isinstance(module, BlockRunner):
            module.activation_checkpointing = on


def _call(block: nn.Module, again: bool, *inputs: Any) -> Any:
    # Within the graph, or what is computed again might take another graph than the first time.
    return checkpoint(block, *inputs, use_reentrant=False) if again else block(*inputs)


@cache
def _compiled_call(varies: bool) -> Callable[..., Any]:
    return torch.compile(_call, dynamic=None if varies else False)
