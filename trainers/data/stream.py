"""Micro batches decoded by actors anywhere on the cluster, in the order of training."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
from ray.exceptions import RayTaskError

from mimray.trainers.errors import MimrayError
from mimray.trainers.types import Batch

if TYPE_CHECKING:
    from mimray.trainers.data.loader import MicroBatch, Samples


def decode_on_cluster(
    samples: Samples, micros: Iterable[MicroBatch], num_actors: int, prefetch_batches: int
) -> Iterator[Batch]:
    """Make micro batches in actors, and yield them in the order given.

    The actors take turns, as the decode processes of one machine do. Each needs a CPU, which Ray
    seeks on nodes without GPUs first. What an actor or a node leaves undone when it dies is made
    again, the same to the bit. The actors end with the iterator, and with the process.

    Args:
        samples: makes the batch of a micro batch; every node has to reach its pictures.
        micros: the micro batches.
        num_actors: number of actors.
        prefetch_batches: batches that each makes ahead.

    Raises:
        DataError: as `Samples` raises it.
    """
    shared = ray.put(samples)
    decoder = ray.remote(_Decoder).options(num_cpus=1, max_restarts=-1, max_task_retries=-1)
    actors = [decoder.remote(shared) for _ in range(num_actors)]
    try:
        asked = (
            actor.make.remote(micro) for actor, micro in zip(cycle(actors), micros, strict=False)
        )
        ahead = deque(islice(asked, num_actors * prefetch_batches))
        while ahead:
            batch = _result(ahead.popleft())
            ahead.extend(islice(asked, 1))
            yield batch
    finally:
        for actor in actors:
            ray.kill(actor)


class _Decoder:
    """Makes micro batches, one at a time."""

    def __init__(self, samples: Samples) -> None:
        torch.set_num_threads(1)
        self._samples = samples

    def make(self, micro: MicroBatch) -> Batch:
        """The micro batch, with arrays for tensors, which Ray hands over without a copy."""
        batch = self._samples.__getitems__(micro)
        arrays: dict[str, Any] = {name: np.asarray(v) for name, v in batch.inputs.items()}
        return replace(batch, inputs=arrays)


def _result(asked: ray.ObjectRef[Batch]) -> Batch:
    try:
        batch: Batch = ray.get(asked)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, MimrayError) else error) from None
    # Copies: what Ray hands over lies in memory that others read, too.
    inputs = {name: torch.tensor(value) for name, value in batch.inputs.items()}
    return replace(batch, inputs=inputs)
