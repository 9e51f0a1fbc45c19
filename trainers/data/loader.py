"""Batches for the training loop: decode processes that work out what a position holds.

The loader carries no state. Batch k of a worker is computed from the plan, k and the worker's
rank alone, so continuing a run is asking for a later first batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from mimray.trainers.config.run import Plan, Recipe
from mimray.trainers.data.decoded import Picture, Pictures
from mimray.trainers.data.order import SampleOrder
from mimray.trainers.data.rng import Stream, generator
from mimray.trainers.data.sources import Source
from mimray.trainers.data.transforms import (
    auto_augment,
    color_jitter,
    random_crop_box,
    to_array,
    view_of,
)
from mimray.trainers.data.workers import decode_workers
from mimray.trainers.errors import DataError, ImageError
from mimray.trainers.types import Batch

DrawMask = Callable[[Recipe, np.random.Generator], np.ndarray | None]
View = tuple[np.ndarray, np.ndarray | None]
# How many following samples are tried in place of one that cannot be decoded.
MAX_SUBSTITUTES = 8


@dataclass(frozen=True)
class Place:
    """One sample to make: which picture, in which epoch."""

    epoch: int
    index: int


@dataclass(frozen=True)
class Sample:
    """One made sample: the picture uint8 [C, H, W], its mask bool [N], and where it came from.

    `tokenizer_pixels` is the same crop at the tokenizer's size; `problems` says why other
    pictures could not be used in its place; `label` is the class of the picture that is shown.
    """

    pixels: np.ndarray
    mask: np.ndarray | None
    place: Place
    problems: tuple[str, ...] = ()
    tokenizer_pixels: np.ndarray | None = None
    label: int | None = None


class Views(Dataset[Sample]):
    """Makes the sample at a place; a pure function of (plan, place).

    Args:
        source: where encoded pictures come from.
        recipe: sizes, crops and seed.
        draw_mask: the method's mask of a sample, or None for no mask.
    """

    def __init__(self, source: Source, recipe: Recipe, draw_mask: DrawMask | None) -> None:
        self.source = source
        self.recipe = recipe
        self.draw_mask = draw_mask
        self.pictures = Pictures(
            source, cache_mib=recipe.data.decoded_cache_mib, labels=recipe.learns_classes
        )

    def __getitem__(self, place: Place) -> Sample:
        """Decode, crop, flip, augment and mask."""
        seed = self.recipe.seed
        mask = None
        if self.draw_mask is not None:
            mask = self.draw_mask(
                self.recipe, generator(seed, Stream.MASK, place.epoch, place.index)
            )
        (pixels, tokenizer_pixels), label, problems = self._pixels(place)
        return Sample(pixels, mask, place, problems, tokenizer_pixels, label)

    def _pixels(self, place: Place) -> tuple[View, int | None, tuple[str, ...]]:
        problems: list[str] = []
        for offset in range(MAX_SUBSTITUTES + 1):
            index = (place.index + offset) % len(self.source)
            try:
                picture = self.pictures[index]
                return self._view(picture, place), picture.label, tuple(problems)
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

    def _view(self, picture: Picture, place: Place) -> View:
        config, tokenizer_size = self.recipe.data, self.recipe.tokenizer_size
        rng = generator(self.recipe.seed, Stream.VIEW, place.epoch, place.index)
        size = picture.size
        box = random_crop_box(rng, size, config.crop_scale, config.crop_ratio)
        flip = bool(rng.random() < config.hflip)
        # Decoding at a lower DCT scale is enough as long as no view is upsampled by it.
        height, width = map(max, zip(config.image_size, tokenizer_size or (0, 0), strict=True))
        enough = (
            int(np.ceil(size[0] * width / (box[2] - box[0]))),
            int(np.ceil(size[1] * height / (box[3] - box[1]))),
        )
        image = picture.decoded(enough)
        scale_x, scale_y = image.width / size[0], image.height / size[1]
        box = (box[0] * scale_x, box[1] * scale_y, box[2] * scale_x, box[3] * scale_y)
        if config.channels == 1:
            image = image.convert("L")
        if config.color_jitter:
            image = color_jitter(rng, image, config.color_jitter)
        view = view_of(image, config.image_size, config.interpolation, box, flip)
        if config.auto_augment:
            view = auto_augment(rng, view, config.auto_augment, config.mean, config.interpolation)
        pixels = to_array(view)
        if tokenizer_size is None:
            return pixels, None
        return pixels, to_array(view_of(image, tokenizer_size, "lanczos", box, flip))


class MicroBatches(Sampler[list[Place]]):
    """The places of one worker's micro batches, from a step to the end of the run.

    The global batch of step s is positions s * G to (s + 1) * G - 1, whatever the number of
    workers; a worker takes its equal share of it.

    Args:
        plan: batch sizes and length.
        order: positions to samples.
        rank: this worker's rank.
        first_step: the step to begin with.
    """

    def __init__(self, plan: Plan, order: SampleOrder, rank: int, first_step: int) -> None:
        self.plan = plan
        self.order = order
        self.rank = rank
        self.first_step = first_step

    def __iter__(self) -> Iterator[list[Place]]:
        plan = self.plan
        share = plan.global_batch // plan.world_size
        for step in range(self.first_step, plan.steps):
            start = step * plan.global_batch + self.rank * share
            for micro in range(plan.accumulation):
                epochs, indices = self.order.take(
                    start + micro * plan.micro_batch_size, plan.micro_batch_size
                )
                yield [Place(int(e), int(i)) for e, i in zip(epochs, indices, strict=True)]

    def __len__(self) -> int:
        return (self.plan.steps - self.first_step) * self.plan.accumulation


def make_loader(
    source: Source,
    plan: Plan,
    draw_mask: DrawMask | None,
    *,
    rank: int = 0,
    first_step: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Micro batches of one worker, `accumulation` of them a step, in order.

    Args:
        source: where encoded pictures come from; picklable.
        plan: sizes, seed, length.
        draw_mask: a picklable function, or None for methods without a mask.
        rank: this worker's rank.
        first_step: the step to begin with; earlier ones are not touched.
        pin_memory: for copies to a GPU.
    """
    data = plan.recipe.data
    order = SampleOrder(source.group_rows, plan.recipe.seed, data.shuffle_window)
    loader = DataLoader(
        Views(source, plan.recipe, draw_mask),
        batch_sampler=MicroBatches(plan, order, rank, first_step),
        collate_fn=collate,
        pin_memory=pin_memory,
        prefetch_factor=data.prefetch_batches if data.num_workers else None,
        **decode_workers(data.num_workers),
    )
    return iter(loader)


def collate(samples: list[Sample]) -> Batch:
    """Stack samples into a batch."""
    labels = [s.label for s in samples if s.label is not None]
    return Batch(
        images=torch.from_numpy(np.stack([s.pixels for s in samples])),
        mask=_stacked([s.mask for s in samples]),
        indices=np.array([s.place.index for s in samples], dtype=np.int64),
        epoch=np.array([s.place.epoch for s in samples], dtype=np.int64),
        problems=tuple(problem for s in samples for problem in s.problems),
        tokenizer_images=_stacked([s.tokenizer_pixels for s in samples]),
        labels=torch.tensor(labels, dtype=torch.int64) if labels else None,
    )


def _stacked(arrays: list[np.ndarray | None]) -> torch.Tensor | None:
    there = [array for array in arrays if array is not None]
    return torch.from_numpy(np.stack(there)) if there else None
