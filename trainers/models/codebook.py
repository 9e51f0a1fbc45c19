"""Codebooks: the vectors of a vocabulary of codes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


class Fp32Buffers(nn.Module):
    """A module whose buffers move between devices with it but stay in fp32."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp32Buffers:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            setattr(self, name, buffer.to(self.get_buffer(name).device))
        return self


class Codebook(Fp32Buffers):
    """The vectors of K codes: an anchor, and a learnt offset from it.

    Replacing a code moves its anchor, not the parameter: the optimiser's fp32 masters would
    overwrite a parameter's new values, and ZeRO-3 shards them.

    Args:
        num_codes: number of codes K.
        dim: width of a code D.
        std: standard deviation of the normal distribution that codes are initialised from.
        learnt: True if codes are learnt by gradient.
    """

    anchor: Tensor

    def __init__(self, num_codes: int, dim: int, *, std: float, learnt: bool) -> None:
        super().__init__()
        start = std * torch.randn(num_codes, dim)
        self.learnt = nn.Parameter(start) if learnt else None
        self.register_buffer("anchor", torch.zeros_like(start) if learnt else start)

    def forward(self) -> Float[Tensor, "K D"]:
        """All vectors, in fp32."""
        return self.anchor if self.learnt is None else self.anchor + self.learnt.float()

    @torch.no_grad()
    def replace(self, chosen: Bool[Tensor, " K"], vectors: Float[Tensor, "n D"]) -> None:
        """Replace the chosen codes by vectors, in ascending order of the codes."""
        self.anchor[chosen] += vectors - self()[chosen]
