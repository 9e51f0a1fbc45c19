"""Groups of pictures over which a method normalises jointly, as Sinkhorn assignment does.

A group is a range of `MethodConfig.assignment_pictures` neighbouring positions of the global batch.
The loader assigns positions so that the micro batches of all workers together hold whole groups, in
the order of ranks; so the same pictures form a group for any number of workers or micro batches.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, Num
from torch import Tensor


def grouped(values: Num[Tensor, B * D], pictures: int) -> Num[Tensor, "G P *D"]:
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


class SharedPlaces:
    """Places of the grid shared out among workers, where each place is normalised by itself.

    Each worker has every so many-th place, of the pictures of all workers; so none holds the scores
    of a whole group, which are as many as pictures x places x clusters.

    Args:
        num_places: places of a picture, N.
        pictures: pictures in a group, P, as for `grouped`.
    """

    def __init__(self, num_places: int, pictures: int) -> None:
        self.num_places, self.pictures = num_places, pictures
        self.rank, self.workers = 0, 1
        if dist.is_initialized():
            self.rank, self.workers = dist.get_rank(), dist.get_world_size()

    def own(self, values: Float[Tensor, "B N D"]) -> Float[Tensor, "G n P D"]:
        """Gather the pictures of all workers at this worker's places; collective.

        Args:
            values: values of this worker's micro batch, without gradients.

        Returns:
            Values by group and place; n may be 0 where there are more workers than places.
        """
        groups = grouped(values, self.pictures)[:, :, self.rank :: self.workers]  # G P n D
        return groups.transpose(1, 2).contiguous()

    def mean(self, own: Float[Tensor, "G n P"]) -> Float[Tensor, ""]:
        """This worker's part of a mean over all places; averaged over workers, it is that mean.

        Args:
            own: values by group and place, in the order of `own`.
        """
        groups, _, pictures = own.shape
        return own.sum() * (self.workers / (groups * pictures * self.num_places))

    def at(
        self, own: Float[Tensor, "G n P K"], places: Int[Tensor, "B M"]
    ) -> Float[Tensor, "B M K"]:
        """Exchange values at chosen places of this worker's pictures; collective.

        Args:
            own: values by group and place, without gradients, in the order of `own`.
            places: indices of the places; as many for every picture of every worker.
        """
        wanted = grouped(places, self.pictures).flatten(0, 1)  # R M, of all workers
        by_picture = own.transpose(1, 2).flatten(0, 1)  # R n K
        if self.workers == 1:
            rows = wanted.unsqueeze(-1).expand(-1, -1, own.shape[-1])
            return by_picture.gather(1, rows)
        found = own.new_zeros(*wanted.shape, own.shape[-1])  # R M K
        picture, at = (wanted % self.workers == self.rank).nonzero(as_tuple=True)
        found[picture, at] = by_picture[picture, wanted[picture, at] // self.workers]
        dist.all_reduce(found)  # a value is some worker's, and zero of the others
        return own_rows(found.unsqueeze(0), len(places))
