"""Pictures as sequences of patches, and selection of tokens by a mask."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def patchify(images: Float[Tensor, "B C H W"], patch_size: int) -> Float[Tensor, "B N P"]:
    """Cut pictures into patches, row-major, each flattened as (row, column, channel).

    Args:
        images: pictures; H and W are multiples of patch_size.
        patch_size: side of a patch, pixels.

    Returns:
        Patches, [B, N, patch_size^2 * C].
    """
    b, c, height, width = images.shape
    p = patch_size
    assert height % p == 0
    assert width % p == 0
    x = images.reshape(b, c, height // p, p, width // p, p)  # B C h p w q
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, p * p * c)  # B (h w) (p q C)


def unpatchify(
    patches: Float[Tensor, "B N P"], patch_size: int, grid: tuple[int, int]
) -> Float[Tensor, "B C H W"]:
    """The inverse of `patchify` for a grid of (rows, columns) of patches."""
    (h, w), p = grid, patch_size
    b, n, _ = patches.shape
    assert n == h * w
    x = patches.reshape(b, h, w, p, p, -1)  # B h w p q C
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, h * p, w * p)  # B C (h p) (w q)


def visible_indices(mask: Bool[Tensor, "B N"]) -> Int[Tensor, "B K"]:
    """Indices of the visible patches, ascending; every row must hide the same number."""
    num_visible = int((~mask[0]).sum())
    # A stable sort of False before True keeps the row-major order.
    order = torch.argsort(mask.to(torch.uint8), dim=1, stable=True)
    return order[:, :num_visible]


def take_tokens(
    tokens: Float[Tensor, "B N D"], indices: Int[Tensor, "B K"]
) -> Float[Tensor, "B K D"]:
    """Select tokens by index along the sequence."""
    return tokens.gather(1, indices.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
