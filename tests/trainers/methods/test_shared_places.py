"""Places shared out among workers: the same values for any number of them."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from mimray.trainers.methods import assignment
from mimray.trainers.methods.assignment import SharedPlaces

PICTURES, PLACES, GROUP = 12, 5, 6


class Workers:
    """Stands for `torch.distributed` of one worker after the other.

    A sum over workers takes two rounds: in the first each adds its own, in the second it gets the
    sum.
    """

    def __init__(self, values: dict[str, Tensor], count: int) -> None:
        self.shards = {name: value.chunk(count) for name, value in values.items()}
        self.count, self.rank = count, 0
        self.sums: dict[int, Tensor] = {}
        self.summed = False

    def is_initialized(self) -> bool:
        return True

    def get_rank(self) -> int:
        return self.rank

    def get_world_size(self) -> int:
        return self.count

    def all_gather(self, parts: list[Tensor], mine: Tensor) -> None:
        (shards,) = [s for s in self.shards.values() if torch.equal(s[self.rank], mine)]
        for part, shard in zip(parts, shards, strict=True):
            part.copy_(shard)

    def all_reduce(self, value: Tensor) -> None:
        if self.summed:
            value.copy_(sum(self.sums.values()))
        else:
            self.sums[self.rank] = value.clone()


def score(tokens: Tensor) -> Tensor:
    """Something that each place makes of all pictures of a group: [G, n, P, D] in and out."""
    return tokens.softmax(dim=-2)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_shared_places__give_each_worker_what_one_alone_has(count: int):
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randn(PICTURES, PLACES, 7, generator=rng)
    places = torch.rand(PICTURES, PLACES, generator=rng).argsort(dim=1)[:, :3]
    grouped = tokens.unflatten(0, (-1, GROUP))  # G P N D
    wanted = grouped.softmax(dim=1).flatten(0, 1)  # over the pictures of each place

    workers = Workers({"tokens": tokens, "places": places}, count)
    found, means = {}, []
    with mock.patch.object(assignment, "dist", workers):
        for workers.summed in (False, True):
            for rank in range(count):
                workers.rank = rank
                shared = SharedPlaces(PLACES, GROUP)
                own = score(shared.own(workers.shards["tokens"][rank]))
                found[rank] = shared.at(own, workers.shards["places"][rank])
                means.append(shared.mean(own.square().sum(dim=-1)))

    rows = places.unsqueeze(-1).expand(-1, -1, 7)
    torch.testing.assert_close(torch.cat([found[r] for r in range(count)]), wanted.gather(1, rows))
    mean = torch.stack(means[:count]).mean()
    torch.testing.assert_close(mean, wanted.square().sum(dim=-1).mean())


def test_shared_places__a_worker_without_places_takes_part():
    workers = Workers({"tokens": torch.zeros(PICTURES, PLACES, 2)}, count=6)
    workers.rank = 5
    with mock.patch.object(assignment, "dist", workers):
        shared = SharedPlaces(PLACES, GROUP)
        own = shared.own(workers.shards["tokens"][5])
        assert own.shape == (2, 0, GROUP, 2)
        assert shared.mean(own.sum(dim=-1)) == 0
