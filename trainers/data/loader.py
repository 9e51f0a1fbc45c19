"""The training loader: batches made by decode processes, as a pure function of position.

The loader carries no state. Batch k of a worker is computed from the plan, k and the worker's
rank alone, so a continued run simply begins with a later batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from mimray.trainers.config.run import Plan, Recipe
from mimray.trainers.data.decoded import Pictures
from mimray.trainers.data.order import SampleOrder
from mimray.trainers.data.sources import Source
from mimray.trainers.data.views import Inputs, Labels, counted, draw_masks, make_inputs
from mimray.trainers.data.workers import decode_workers
from mimray.trainers.environment.limits import free_shared_memory
from mimray.trainers.errors import DataError, ImageError
from mimray.trainers.types import PARTNERS, Batch

# Number of following samples to try in place of one that cannot be decoded.
MAX_SUBSTITUTES = 8
# Batches for which shared memory must have room: other processes fill it at the same time.
ROOM_FOR_BATCHES = 16


@dataclass(frozen=True)
class Place:
    """The place of a sample: its epoch, and its picture's index in the dataset."""

    epoch: int
    index: int


@dataclass(frozen=True)
class Sample:
    """The inputs of one sample.

    Attributes:
        inputs: arrays by name, as `views.make_inputs` returns them.
        place: the sample's place.
        problems: reasons why the pictures before the one used could not be decoded.
    """

    inputs: dict[str, np.ndarray]
    place: Place
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class MicroBatch:
    """The places of a micro batch.

    Attributes:
        places: the places of its samples; after them, those of partners that are not among them.
        partners: the row of each sample's partner, where pictures are combined in pairs.
        share: the places of the worker's whole share of the global batch, with the first micro
            batch of a step, where hidden patches are counted.
    """

    places: tuple[Place, ...]
    partners: tuple[int, ...] = ()
    share: tuple[Place, ...] = ()


class Samples(Dataset[Sample]):
    """A dataset that makes the sample of a place, a pure function of plan and place.

    Args:
        source: the encoded pictures.
        recipe: the recipe, with its seed, channels and handling of undecodable pictures.
        inputs: the method's declared inputs.
    """

    def __init__(self, source: Source, recipe: Recipe, inputs: Inputs) -> None:
        self.source = source
        self.recipe = recipe
        self.inputs = tuple(inputs)
        self.pictures = Pictures(
            source,
            cache_mib=recipe.data.decoded_cache_mib,
            labels=any(isinstance(wanted, Labels) for wanted in inputs),
        )

    def __getitems__(self, micro: MicroBatch) -> Batch:
        """Make a micro batch; torch's loader calls it by this name.

        Raises:
            DataError: as for one sample.
        """
        batch = collate([self[place] for place in micro.places])
        inputs: dict[str, Any] = batch.inputs
        if micro.partners:
            inputs = {**inputs, PARTNERS: np.array(micro.partners, dtype=np.int64)}
        return replace(batch, inputs=inputs, hidden=self._hidden(micro.share))

    def _hidden(self, share: Iterable[Place]) -> dict[str, int]:
        """Hidden patches of a share, by name; only the masks are drawn."""
        counts: dict[str, int] = {}
        seed = self.recipe.seed
        for place in share:
            for view, first in counted(self.inputs):
                masks = draw_masks(view, first, seed=seed, epoch=place.epoch, index=place.index)
                name = view.masks.mean_name if view.masks else ""
                counts[name] = counts.get(name, 0) + int(masks.sum())
        return counts

    def __getitem__(self, place: Place) -> Sample:
        """Decode, crop, augment and mask; the next picture substitutes one that is broken.

        Raises:
            DataError: a picture cannot be decoded and `data.on_bad` is `fail`, or too many in a
                row cannot.
        """
        problems: list[str] = []
        for offset in range(MAX_SUBSTITUTES + 1):
            index = (place.index + offset) % len(self.source)
            try:
                made = make_inputs(
                    self.inputs,
                    self.pictures[index],
                    seed=self.recipe.seed,
                    epoch=place.epoch,
                    index=place.index,
                    channels=self.recipe.data.channels,
                )
                return Sample(made, place, tuple(problems))
            except ImageError as error:
                name = self.source.name(index)
                if self.recipe.data.on_bad == "fail":
                    raise DataError(
                        f"{name}: {error}",
                        hint="`mimray data ingest` sorts such pictures out, "
                        "or --set data.on_bad=substitute",
                    ) from error
                problems.append(f"{name}: {error}; the next picture stands in")
        raise DataError(
            f"{MAX_SUBSTITUTES + 1} pictures in a row cannot be decoded, "
            f"the last {self.source.name(index)}",
            hint="`mimray data ingest` sorts such pictures out",
        )


class MicroBatches(Sampler[Any]):
    """A sampler of the places of one worker's micro batches, from a step to the end of the run.

    The global batch of step s is positions s * G to (s + 1) * G - 1, for any number of workers. A
    worker takes an equal share: one range of positions, or, if the method normalises over groups of
    pictures, one range per micro step, so that the micro batches of all workers together are whole
    groups.

    Where the method combines pictures in pairs, those are neighbours in the global batch: the
    positions 2 k and 2 k + 1 of it. The last one of an odd batch is its own partner.

    Args:
        plan: the run's plan, with batch sizes and length.
        order: the order of samples, from positions to epochs and indices.
        rank: this worker's rank.
        first_step: the step to begin with.
        shares: True to add the worker's share to the first micro batch of each step.
    """

    def __init__(
        self, plan: Plan, order: SampleOrder, rank: int, first_step: int, *, shares: bool = False
    ) -> None:
        self.plan = plan
        self.order = order
        self.rank = rank
        self.first_step = first_step
        self.shares = shares

    def __iter__(self) -> Iterator[MicroBatch]:
        plan = self.plan
        size = plan.micro_batch_size
        together = plan.recipe.method.assignment_pictures > 1
        # Positions between the micro batches of neighbouring workers, and of one worker.
        between_ranks, between_micros = size * plan.accumulation, size
        if together:
            between_ranks, between_micros = size, size * plan.world_size
        share_size = size * plan.accumulation
        for step in range(self.first_step, plan.steps):
            start = step * plan.global_batch + self.rank * between_ranks
            for micro in range(plan.accumulation):
                share: tuple[Place, ...] = ()
                if self.shares and micro == 0:
                    share = self._places(
                        step * plan.global_batch + self.rank * share_size, share_size
                    )
                first = start + micro * between_micros
                if plan.recipe.method.pairs:
                    yield replace(self._in_pairs(step, first), share=share)
                else:
                    yield MicroBatch(self._places(first, size), share=share)

    def _places(self, position: int, count: int) -> tuple[Place, ...]:
        epochs, indices = self.order.take(position, count)
        return tuple(Place(int(e), int(i)) for e, i in zip(epochs, indices, strict=True))

    def _in_pairs(self, step: int, first: int) -> MicroBatch:
        """The micro batch from a position on, with partners that it does not hold itself."""
        size, batch = self.plan.micro_batch_size, self.plan.global_batch
        start = step * batch
        own = range(first - start, first - start + size)  # positions in the global batch
        partners = [(k ^ 1) if (k ^ 1) < batch else k for k in own]
        others = [k for k in partners if k not in own]
        places = self._places(first, size)
        for k in others:
            places += self._places(start + k, 1)
        rows = {k: row for row, k in enumerate([*own, *others])}
        return MicroBatch(places, partners=tuple(rows[k] for k in partners))

    def __len__(self) -> int:
        return (self.plan.steps - self.first_step) * self.plan.accumulation


def training_order(source: Source, recipe: Recipe) -> SampleOrder:
    """The order in which a recipe's run sees the samples of a source."""
    return SampleOrder(
        source.group_rows, recipe.seed, recipe.data.shuffle_window, source.open_groups
    )


def make_loader(
    source: Source,
    plan: Plan,
    inputs: Inputs,
    *,
    rank: int = 0,
    first_step: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Make the micro batches of one worker, `accumulation` of them per step, in order.

    Args:
        source: the encoded pictures; picklable.
        plan: the run's plan, with sizes, seed and length.
        inputs: the method's declared inputs; picklable.
        rank: this worker's rank.
        first_step: the step to begin with; earlier ones are not read.
        pin_memory: True for batches in page-locked memory, which speeds copies to a GPU.
    """
    data = plan.recipe.data
    order = training_order(source, plan.recipe)
    samples = Samples(source, plan.recipe, inputs)
    micros = MicroBatches(plan, order, rank, first_step, shares=bool(list(counted(inputs))))
    if data.stream == "ray":
        from mimray.trainers.data.stream import decode_on_cluster

        batches = decode_on_cluster(samples, micros, data.num_workers, data.prefetch_batches)
        return map(Batch.pin_memory, batches) if pin_memory else batches
    loader = DataLoader(
        samples,
        batch_sampler=micros,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        **decode_workers(data.num_workers, data.prefetch_batches),
    )
    return map(_as_tensors, loader)


def _as_it_is(batch: Any) -> Any:
    return batch


def collate(samples: list[Sample]) -> Batch:
    """Stack samples into a batch.

    A decode process hands tensors over in shared memory. Where that has no room, as in a container
    of 64 MiB, it hands over arrays, which go through a pipe.
    """
    inputs: dict[str, Any] = {
        name: np.stack([s.inputs[name] for s in samples]) for name in samples[0].inputs
    }
    num_bytes = sum(array.nbytes for array in inputs.values())
    if get_worker_info() is None or num_bytes * ROOM_FOR_BATCHES <= free_shared_memory():
        inputs = {name: torch.from_numpy(array) for name, array in inputs.items()}
    return Batch(
        inputs=inputs,
        indices=np.array([s.place.index for s in samples], dtype=np.int64),
        epoch=np.array([s.place.epoch for s in samples], dtype=np.int64),
        problems=tuple(problem for s in samples for problem in s.problems),
    )


def _as_tensors(batch: Batch) -> Batch:
    inputs = {name: torch.as_tensor(value) for name, value in batch.inputs.items()}
    return replace(batch, inputs=inputs)
