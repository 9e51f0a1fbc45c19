"""Inputs by name: what a method may want of a picture, and how it is made.

A method declares its inputs (`Method.views`); the loader makes them, the loop hands them over under
their names, and nothing else spells what a batch holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from mimray.trainers.config.run import Recipe
from mimray.trainers.data.decoded import Picture
from mimray.trainers.data.rng import Stream, generator
from mimray.trainers.data.transforms import (
    Box,
    auto_augment,
    color_jitter,
    inference_view,
    random_crop_box,
    to_array,
    view_of,
)

DrawMask = Callable[[np.random.Generator], np.ndarray]
"""A mask bool [N] over the grid of a view, True = hidden; a pure function of its generator."""

Transform = Callable[[np.random.Generator, Image.Image], Image.Image]
"""A random change of a picture, a pure function of its generator."""


@dataclass(frozen=True)
class Masks:
    """Masks of a view.

    Attributes:
        draw: a picklable function that makes one.
        count: masks a view; with more than one the tensor has an axis for them.
        name: argument of the method's `forward`.
    """

    draw: DrawMask
    count: int = 1
    name: str = "mask"


@dataclass(frozen=True)
class View:
    """Pictures as a method wants them: uint8 [B, C, H, W], or [B, count, C, H, W].

    Each view of a picture has a stream of randomness of its own, numbered in the order of
    declaration; a view that is `like` another shares its crop, flip and `before`.

    Attributes:
        name: argument of the method's `forward`.
        size: (height, width) in pixels.
        count: views a picture, each of another crop.
        like: name of a view declared before whose crops this one shows too, at a size of its own.
        crop_scale: bounds of the crop's area over the picture's.
        crop_ratio: bounds of the crop's width over its height.
        hflip: probability that the view is mirrored.
        interpolation: bicubic, bilinear or lanczos.
        before: changes of the whole picture, in order.
        after: changes of the view at its final size, in order.
        masks: what is hidden of each view; None for nothing.
        erasing: probability that a view loses a rectangle to noise.
        normalised: True: `forward` gets floats, normalised by `data.mean` and `data.std`;
            False: uint8, as stored.
    """

    name: str
    size: tuple[int, int]
    count: int = 1
    like: str = ""
    crop_scale: tuple[float, float] = (1.0, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.0
    interpolation: str = "bicubic"
    before: tuple[Transform, ...] = ()
    after: tuple[Transform, ...] = ()
    masks: Masks | None = None
    erasing: float = 0.0
    normalised: bool = True


@dataclass(frozen=True)
class Labels:
    """The class of each picture, int64 [B].

    Attributes:
        name: argument of the method's `forward`.
    """

    name: str = "labels"


Inputs = Sequence[View | Labels]


class Numbered(NamedTuple):
    """A view with the numbers of its streams: `first` to `first + view.count - 1`."""

    view: View
    first: int


def training_view(recipe: Recipe, name: str = "images", *, masks: Masks | None = None) -> View:
    """The view that a recipe's `data` section describes.

    Args:
        recipe: size, crop, flip and augmentation.
        name: argument of the method's `forward`.
        masks: what is hidden of it.
    """
    data = recipe.data
    jitter = partial(color_jitter, strength=data.color_jitter)
    augment = partial(
        auto_augment, policy=data.auto_augment, mean=data.mean, interpolation=data.interpolation
    )
    return View(
        name=name,
        size=data.image_size,
        crop_scale=data.crop_scale,
        crop_ratio=data.crop_ratio,
        hflip=data.hflip,
        interpolation=data.interpolation,
        before=(jitter,) if data.color_jitter else (),
        after=(augment,) if data.auto_augment else (),
        masks=masks,
        erasing=data.random_erasing,
    )


def numbered(inputs: Inputs) -> Iterator[Numbered]:
    """The views among inputs, each with the number of its first stream."""
    firsts: dict[str, int] = {}
    following = 0
    for view in inputs:
        if not isinstance(view, View):
            continue
        if view.like:
            assert view.like in firsts, f"{view.name} is like {view.like}, which is not declared"
            firsts[view.name] = firsts[view.like]
        else:
            firsts[view.name] = following
            following += view.count
        yield Numbered(view, firsts[view.name])


def make_inputs(
    inputs: Inputs, picture: Picture, *, seed: int, epoch: int, index: int, channels: int
) -> dict[str, np.ndarray]:
    """Cut, change and mask one picture; a pure function of its arguments.

    The picture is decoded once, at the least resolution at which no view is enlarged.

    Args:
        inputs: what is wanted of it.
        picture: where the pixels come from.
        seed: the run's.
        epoch: of the sample.
        index: of the sample, which another picture may stand in for.
        channels: 1 for gray, else 3.

    Returns:
        By name: uint8 [C, H, W], masks bool [N], labels int64 []; with an axis in front for
        more than one.

    Raises:
        ImageError: the picture cannot be decoded.
    """
    views = list(numbered(inputs))
    crops = {
        first + k: _Crop(view, picture.size, generator(seed, Stream.VIEW, epoch, index, first + k))
        for view, first in views
        if not view.like
        for k in range(view.count)
    }
    wanted = [
        crops[first + k].enough(picture.size, view.size)
        for view, first in views
        for k in range(view.count)
    ]
    image = picture.decoded((max(w for w, _ in wanted), max(h for _, h in wanted)))
    if channels == 1:
        image = image.convert("L")
    made: dict[str, np.ndarray] = {}
    for view, first in views:
        made[view.name] = _stack(
            [crops[first + k].cut(view, image, picture.size) for k in range(view.count)]
        )
        if view.masks is not None:
            made[view.masks.name] = draw_masks(view, first, seed=seed, epoch=epoch, index=index)
    for label in inputs:
        if isinstance(label, Labels):
            assert picture.label is not None
            made[label.name] = np.asarray(picture.label, dtype=np.int64)
    return made


def draw_masks(view: View, first: int, *, seed: int, epoch: int, index: int = 0) -> np.ndarray:
    """The masks of the views of one picture.

    Args:
        view: that has masks.
        first: number of its first stream.
        seed: the run's.
        epoch: of the sample.
        index: of the sample.

    Returns:
        bool [views, masks, N], without the axes of length 1.
    """
    assert view.masks is not None
    found = []
    for k in range(view.count):
        rng = generator(seed, Stream.MASK, epoch, index, first + k)
        found.append(_stack([view.masks.draw(rng) for _ in range(view.masks.count)]))
    return _stack(found)


def whole_picture(view: View, image: Image.Image) -> np.ndarray:
    """The whole picture resized to a view's size, as many times as the view counts."""
    return _stack([inference_view(image, view.size, view.interpolation)] * view.count)


class _Crop:
    """A crop of a picture, and the generator that goes on after it was drawn."""

    def __init__(self, view: View, size: tuple[int, int], rng: np.random.Generator) -> None:
        self.box: Box = random_crop_box(rng, size, view.crop_scale, view.crop_ratio)
        self.flip = bool(rng.random() < view.hflip)
        self._rng = rng
        self._before = view.before
        self._changed: Image.Image | None = None

    def enough(self, size: tuple[int, int], view_size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of the whole picture at which the crop has the view's size."""
        left, top, right, bottom = self.box
        height, width = view_size
        return (
            int(np.ceil(size[0] * width / (right - left))),
            int(np.ceil(size[1] * height / (bottom - top))),
        )

    def cut(self, view: View, image: Image.Image, size: tuple[int, int]) -> np.ndarray:
        """The crop of a view, uint8 [C, H, W]; the first to be cut is the one it was drawn for."""
        if self._changed is None:
            for change in self._before:
                image = change(self._rng, image)
            self._changed = image
        image = self._changed
        scale_x, scale_y = image.width / size[0], image.height / size[1]
        left, top, right, bottom = self.box
        box = (left * scale_x, top * scale_y, right * scale_x, bottom * scale_y)
        found = view_of(image, view.size, view.interpolation, box, self.flip)
        for change in view.after:
            found = change(self._rng, found)
        return to_array(found)


def _stack(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.stack(arrays)
