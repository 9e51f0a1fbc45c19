"""Groups of pictures over which a method normalises together, such as Sinkhorn's.

A group is so many neighbouring positions of the global batch (`MethodConfig.assignment_pictures`).
The loader hands out positions so that the micro batches of all workers at once hold whole groups,
in the order of ranks; so the same pictures form a group whatever the number of workers or of micro
batches.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


def grouped(values: Float[Tensor, B * D], pictures: int) -> Float[Tensor, "G P *D"]:
    """The values of all workers, by group; collective, and the same on every rank.

    Args:
        values: of this rank's micro batch, without gradients.
        pictures: in a group, P.

    Returns:
        G groups. Where the pictures do not divide into groups, as in evaluation, all are one.
    """
    whole = values
    if dist.is_initialized() and dist.get_world_size() > 1:
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, values.contiguous())
        whole = torch.cat(parts)
    return whole.unflatten(0, (-1, pictures if len(whole) % pictures == 0 else len(whole)))


def own_rows(groups: Float[Tensor, "G P *D"], batch: int) -> Float[Tensor, B * D]:
    """What `grouped` values became, of this rank's pictures.

    Args:
        groups: by group, in the order of `grouped`.
        batch: pictures of this rank's micro batch.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    return groups.flatten(0, 1)[rank * batch : (rank + 1) * batch]
