"""Operations that autocast must leave alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def full_precision(tensor: Tensor) -> Iterator[None]:
    """Compute in the operands' own precision, where `engine.precision` bf16 would lower it.

    Autocast computes products and convolutions in bf16 even if their operands are fp32. Targets,
    distances to codes and networks with a precision of their own need this around them.

    Args:
        tensor: an operand; autocast is switched off on its device.
    """
    # Shapes alone, on the meta device, are traced as of a CPU.
    with torch.autocast("cuda" if tensor.is_cuda else "cpu", enabled=False):
        yield
