"""Noise of a training that belongs to samples: the same for one in whatever batch it is.

The loop names the samples of a micro batch by seeds (`Method.at_batch`). Without seeds, as in tests
of a network alone, noise is drawn from torch's generator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

_GOLDEN = 0x9E3779B97F4A7C15


class SampleNoise(nn.Module):
    """The base of modules that draw noise.

    A backward pass that computes activations again draws the same.

    Attributes:
        seeds: int64 [B] on the host, the bits of a seed for each sample; None to draw from torch's
            generator.
    """

    seeds: Tensor | None = None


class DropPath(SampleNoise):
    """Stochastic depth: leaves out a residual branch for some samples, and scales the others up.

    Args:
        drop_prob: share of samples that go without the branch.
        place: number of this branch in the network; each has draws of its own.

    Source: Huang et al. 2016, "Deep Networks with Stochastic Depth"; as timm's `DropPath`.
    """

    def __init__(self, drop_prob: float, place: int) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.place = place
        # Tensors, so that one compiled graph serves all blocks of a network.
        self._share, self._scale = torch.tensor(drop_prob), torch.tensor(1 / (1 - drop_prob))
        self._offset = torch.tensor(_signed((place + 1) * _GOLDEN))

    def forward(self, branch: Tensor) -> Tensor:
        """Scale the rows of a branch, [R, …]: [B x views, …], sample-major, for several views."""
        if not self.training:
            return branch
        rows = len(branch)
        if self.seeds is None:
            drawn = torch.rand(rows, device=branch.device)
        else:
            drawn = _uniform(_of_rows(self.seeds, rows) + self._offset).to(branch.device)
        scale = (drawn >= self._share).to(branch.dtype) * self._scale
        return branch * scale.reshape(rows, *[1] * (branch.ndim - 1))


class Noise(SampleNoise):
    """Normal or exponential numbers on the device."""

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers of the shape of `like`, [B, …]."""
        if self.seeds is None:
            return torch.randn_like(like)
        return self._by_row(like, Tensor.normal_)

    def exponential(self, like: Tensor) -> Tensor:
        """Exponential numbers of rate 1, of the shape of `like`, [B, …]."""
        if self.seeds is None:
            return torch.empty_like(like, memory_format=torch.contiguous_format).exponential_()
        return self._by_row(like, Tensor.exponential_)

    def _by_row(self, like: Tensor, fill: Callable[..., Tensor]) -> Tensor:
        assert self.seeds is not None
        found = torch.empty_like(like, memory_format=torch.contiguous_format)
        generator = torch.Generator(like.device)
        for row, seed in zip(found, _of_rows(self.seeds, len(like)).tolist(), strict=True):
            fill(row, generator=generator.manual_seed(seed % 2**64 >> 1))
        return found


def replace_drop_path(blocks: Sequence[nn.Module], first_place: int = 0) -> None:
    """Put this module's drop path in the place of timm's, in blocks of one network.

    Args:
        blocks: the blocks, in order.
        first_place: number of the first branch.
    """
    from timm.layers import DropPath as TimmDropPath

    place = first_place
    for block in blocks:
        for name, module in list(block.named_children()):
            if isinstance(module, TimmDropPath):
                setattr(block, name, DropPath(module.drop_prob, place))
            place += 1


def _of_rows(seeds: Tensor, rows: int) -> Tensor:
    """Seeds of rows, which are sample-major: [B x views, …], a sample's views one after another.

    Views in any other order would share noise between samples.

    Args:
        seeds: int64 [B], the bits of a seed for each sample.
        rows: number of rows, a multiple of B.
    """
    views, left = divmod(rows, len(seeds))
    assert not left, f"{rows} rows of {len(seeds)} samples"
    return (seeds.unsqueeze(1) + torch.arange(views)).flatten()  # B x views


def _uniform(seeds: Tensor) -> Tensor:
    """A number in [0, 1) for each seed, fp32, by the output function of SplitMix64.

    Sums and products of int64 wrap around to the bits of those of uint64.

    Source: Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators".
    """
    mixed = (seeds ^ _shifted(seeds, 30)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ _shifted(mixed, 27)) * _signed(0x94D049BB133111EB)
    mixed = mixed ^ _shifted(mixed, 31)
    return _shifted(mixed, 40).float() * 2.0**-24


def _shifted(bits: Tensor, places: int) -> Tensor:
    """Bits to the right, with zeros from the left."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def _signed(number: int) -> int:
    """The number of 64 bits, with a sign, that has the lowest bits of another."""
    return (number + 2**63) % 2**64 - 2**63
