"""Groups of pictures over which a method normalises jointly, as Sinkhorn assignment does.

A group is a range of `MethodConfig.assignment_pictures` neighbouring positions of the global batch.
The loader assigns positions so that the micro batches of all workers together hold whole groups, in
the order of ranks; so the same pictures form a group for any number of workers or micro batches.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


def grouped(values: Float[Tensor, B * D], pictures: int) -> Float[Tensor, "G P *D"]:
    """Gather the values of all workers by group; collective, the same result on every rank.

    Args:
        values: values of this rank's micro batch, without gradients.
        pictures: pictures in a group, P.

    Returns:
        The values of G groups; of a single group if the pictures do not divide into groups, as in
        evaluation.
    """
    whole = values
    if dist.is_initialized() and dist.get_world_size() > 1:
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, values.contiguous())
        whole = torch.cat(parts)
    size = pictures if len(whole) % pictures == 0 else len(whole)
    return whole.reshape(-1, size, *whole.shape[1:])


def own_rows(groups: Float[Tensor, "G P *D"], batch: int) -> Float[Tensor, B * D]:
    """Select this rank's rows of values by group, the inverse of `grouped`.

    Args:
        groups: values by group, in the order of `grouped`.
        batch: number of pictures in this rank's micro batch.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    return groups.flatten(0, 1)[rank * batch : (rank + 1) * batch]
