"""The vectors of a vocabulary of codes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


class Fp32Buffers(nn.Module):
    """Its buffers follow it to another device, but not to a lower precision."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp32Buffers:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            setattr(self, name, buffer.to(self.get_buffer(name).device))
        return self


class Codebook(Fp32Buffers):
    """The vectors of K codes: an anchor, and what gradient descent adds to it.

    Who puts a code elsewhere moves its anchor. The values of a parameter are the optimiser's:
    its fp32 masters undo what is written over them, and ZeRO-3 takes them away.

    Args:
        num_codes: K.
        dim: width of a code D.
        std: of the normal that codes start from.
        learnt: whether codes are learnt by gradient.
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
        """Put vectors in the places of the chosen codes, in their order."""
        self.anchor[chosen] += vectors - self()[chosen]
