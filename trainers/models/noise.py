"""Noise of a training that belongs to samples: the same for one in whatever batch it is.

The loop names the samples of a micro batch by seeds (`Method.at_batch`). Without seeds, as in tests
of a network alone, noise is drawn from torch's generator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class SampleNoise(nn.Module):
    """The base of modules that draw noise.

    A backward pass that computes activations again draws the same.

    Attributes:
        seeds: uint64 [B], a seed for each sample; None to draw from torch's generator.
    """

    seeds: np.ndarray | None = None


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

    def forward(self, branch: Tensor) -> Tensor:
        """Scale the rows of a branch, [R, …]: [B x views, …], sample-major, for several views."""
        if not self.training:
            return branch
        rows = len(branch)
        if self.seeds is None:
            drawn = torch.rand(rows, device=branch.device)
        else:
            uniform = _uniform(_of_rows(self.seeds, rows), self.place)
            drawn = torch.from_numpy(uniform).to(branch.device)
        scale = (drawn >= self.drop_prob).to(branch.dtype) / (1 - self.drop_prob)
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
            fill(row, generator=generator.manual_seed(seed >> 1))
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


def _of_rows(seeds: np.ndarray, rows: int) -> np.ndarray:
    """Seeds of rows, which are sample-major: [B x views, …], a sample's views one after another.

    Views in any other order would share noise between samples.

    Args:
        seeds: uint64 [B], a seed for each sample.
        rows: number of rows, a multiple of B.
    """
    views, left = divmod(rows, len(seeds))
    assert not left, f"{rows} rows of {len(seeds)} samples"
    return np.repeat(seeds, views) + np.tile(np.arange(views, dtype=np.uint64), len(seeds))


def _uniform(seeds: np.ndarray, place: int) -> np.ndarray:
    """A number in [0, 1) for each seed, fp32, by the output function of SplitMix64.

    Source: Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators".
    """
    with np.errstate(over="ignore"):
        mixed = seeds + np.uint64(place + 1) * _GOLDEN
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return ((mixed >> np.uint64(40)) * 2.0**-24).astype(np.float32)
