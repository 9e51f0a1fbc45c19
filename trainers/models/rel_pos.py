"""Relative position bias: a bias on attention by the offset between two patches."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float, Int
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mimray.trainers.models.full_precision import full_precision


class RelPosBias(nn.Module):
    """A learned bias for every offset between two patches, initialised to zero.

    The table has a row for each of the (2h - 1)(2w - 1) offsets (query minus key, row-major) and
    three for the class token: as query, as key, as both.

    Args:
        grid: (rows, columns) of patches.
        num_heads: attention heads.

    Source: Bao et al. 2022, sec. 2.3 and the official BEiT code, whose parameter name it keeps.
    """

    relative_position_index: Tensor

    def __init__(self, grid: tuple[int, int], num_heads: int) -> None:
        super().__init__()
        self.grid = grid
        rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
        self.register_buffer("relative_position_index", relative_index(grid), persistent=False)

    def forward(self, grid: tuple[int, int]) -> Float[Tensor, "1 heads T T"]:
        """The bias of every pair of tokens, the class token first.

        Args:
            grid: (rows, columns) of patches of the input; the table is resized to another grid.

        Returns:
            float [1, heads, 1 + N, 1 + N], to be added to the attention scores.
        """
        table: Tensor = self.relative_position_bias_table
        index = self.relative_position_index
        if grid != self.grid:
            table = resize_table(table, self.grid, grid)
            index = relative_index(grid).to(table.device)
        bias = table[index]  # T T heads
        return bias.permute(2, 0, 1).unsqueeze(0).contiguous()


class RelPosBlock(Block):  # type: ignore[misc]  # timm has no types
    """A transformer block with its own relative position table."""

    def __init__(
        self, dim: int, num_heads: int, *args: object, grid: tuple[int, int], **kwargs: object
    ) -> None:
        super().__init__(dim, num_heads, *args, **kwargs)
        self.rel_pos_bias = RelPosBias(grid, num_heads)

    def forward(self, x: Float[Tensor, "B T D"], grid: tuple[int, int]) -> Float[Tensor, "B T D"]:
        """Transform the tokens of a grid, the class token first."""
        out: Tensor = super().forward(x, self.rel_pos_bias(grid).to(x.dtype))
        return out


def spread_over_blocks(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Give each block a copy of the table that all blocks share; the outputs stay the same.

    Args:
        state: weights of an encoder of `rel_pos_bias` shared.
        depth: number of blocks.

    Source: the official BEiT code (`run_class_finetuning.py`), which fine-tunes so.
    """
    shared = "rel_pos_bias.relative_position_bias_table"
    rest = {key: value for key, value in state.items() if key != shared}
    tables = {f"blocks.{block}.{shared}": state[shared].clone() for block in range(depth)}
    return rest | tables


def relative_index(grid: tuple[int, int]) -> Int[Tensor, "T T"]:
    """Index into the table for each pair of tokens (query, key), the class token first.

    Args:
        grid: (rows, columns) of patches.
    """
    h, w = grid
    row, column = torch.arange(h * w) // w, torch.arange(h * w) % w
    down = row.unsqueeze(1) - row + h - 1  # N N, from 0
    across = column.unsqueeze(1) - column + w - 1
    num_offsets = (2 * h - 1) * (2 * w - 1)
    index = torch.empty(1 + h * w, 1 + h * w, dtype=torch.long)
    index[1:, 1:] = down * (2 * w - 1) + across
    index[0, :] = num_offsets
    index[:, 0] = num_offsets + 1
    index[0, 0] = num_offsets + 2
    return index


def resize_table(
    table: Float[Tensor, "old heads"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Tensor, "new heads"]:
    """Resize a relative position table to another grid or window.

    Offsets stay in patches: near ones keep their values, and only towards the edge of a larger
    grid are values spread, at distances that grow geometrically. A smaller grid loses the far
    offsets, and an axis of the same size keeps its values. Rows after the offsets, such as those
    of the class token, are kept.

    Args:
        table: [(2h - 1)(2w - 1) + extra, heads].
        old: (h, w), the table's grid or window.
        new: (h, w), the grid or window of the result.

    Source: the official BEiT code (`run_class_finetuning.py`), with linear interpolation as in
        timm. There the growth is at least 1.01, which shifts values even where an axis keeps its
        size; here it may be 1.
    """
    heads = table.shape[1]
    num_offsets = (2 * old[0] - 1) * (2 * old[1] - 1)
    offsets = table[:num_offsets].float().view(2 * old[0] - 1, 2 * old[1] - 1, heads)
    down, across = (
        torch.from_numpy(_interpolation(*sizes)).to(offsets) for sizes in zip(old, new, strict=True)
    )
    with full_precision(offsets):
        resized = torch.einsum("yr,xc,rch->yxh", down, across, offsets)
    return torch.cat([resized.flatten(0, 1).to(table.dtype), table[num_offsets:]])


@functools.lru_cache(maxsize=64)
def _interpolation(old: int, new: int) -> np.ndarray:
    """Interpolation weights, float [2 new - 1, 2 old - 1], from old offsets to new ones."""
    growth = _growth(old - 1, new - 1)
    far = np.cumsum(growth ** np.arange(old - 1))
    known = np.concatenate([-far[::-1], [0.0], far])
    wanted = np.arange(1 - new, new)
    return np.stack([np.interp(wanted, known, unit) for unit in np.eye(len(known))], axis=1)


def _growth(num_steps: int, reach: int) -> float:
    """The factor, 1 to 1.5, by which successive steps from 1 must grow to sum to `reach`."""
    low, high = 1.0, 1.5
    while high - low > 1e-9:
        middle = (low + high) / 2
        if np.sum(middle ** np.arange(num_steps)) > reach:
            high = middle
        else:
            low = middle
    return low
