"""Inputs of a method by name: views, masks, labels and numbers of a picture, and their making.

A method declares its inputs (`Method.views`); the loader makes them, and the loop passes them to
`forward` under their names. Nothing else defines the contents of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from mimray.trainers.config.run import Recipe
from mimray.trainers.data.decoded import Picture
from mimray.trainers.data.resample import (
    IntBox,
    Pixels,
    resampled,
    to_image,
    to_pixels,
    to_planes,
)
from mimray.trainers.data.rng import Stream, generator
from mimray.trainers.data.transforms import (
    Box,
    auto_augment,
    color_jitter,
    inference_view,
    random_crop_box,
)

DrawMask = Callable[[np.random.Generator], np.ndarray]
"""Draws a mask, bool [N] over the grid of a view, True = hidden; pure given its generator."""

DrawNumbers = Callable[[np.random.Generator], np.ndarray]
"""Draws a method's random numbers of one picture, float32 [D]; pure given its generator."""

Transform = Callable[[np.random.Generator, Image.Image], Image.Image]
"""A random augmentation of a picture; pure given its generator."""


@dataclass(frozen=True)
class Masks:
    """Masks of a view.

    Attributes:
        draw: a picklable function that draws a mask.
        count: masks per view; more than one add an axis to the tensor.
        name: the argument's name in the method's `forward`.
        mean_name: name of another argument of `forward`, float []: the hidden patches of a picture,
            all its masks together, averaged over the global batch. A loss that is divided by it
            weighs all hidden patches alike, in whatever micro batch they are. Empty for none, where
            every mask hides the same number.
    """

    draw: DrawMask
    count: int = 1
    name: str = "mask"
    mean_name: str = ""


@dataclass(frozen=True)
class View:
    """Views of pictures: uint8 [B, C, H, W], or [B, count, C, H, W].

    Each view of a picture has its own stream of randomness, numbered in the order of declaration; a
    view that is `like` another shares its crop, flip and `before`.

    Attributes:
        name: the argument's name in the method's `forward`.
        size: (height, width) in pixels.
        count: views per picture, each with its own crop.
        like: name of an earlier view, of `count` or more, whose crops this one shows at its own
            size; empty for none.
        crop_scale: bounds of the crop's area over the picture's.
        crop_ratio: bounds of the crop's width over its height.
        hflip: probability of a horizontal flip.
        interpolation: bicubic, bilinear or lanczos.
        before: augmentations of the whole picture, in order.
        after: augmentations of the view at its final size, in order.
        masks: masks of each view; None for none.
        erasing: probability that a rectangle of a view is filled with noise.
        normalised: True if `forward` gets floats, normalised by `data.mean` and `data.std`; False
            for uint8, as stored.
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
        name: the argument's name in the method's `forward`.
    """

    name: str = "labels"


@dataclass(frozen=True)
class Numbers:
    """Random numbers of each picture, float32 [B, D]; none outside training.

    Attributes:
        draw: a picklable function that draws them.
        name: the argument's name in the method's `forward`.
    """

    draw: DrawNumbers
    name: str


Inputs = Sequence[View | Labels | Numbers]


class Numbered(NamedTuple):
    """A view with its number; its streams are `first` to `first + view.count - 1`."""

    view: View
    first: int


def training_view(recipe: Recipe, name: str = "images", *, masks: Masks | None = None) -> View:
    """Make the view that a recipe's `data` section describes.

    Args:
        recipe: the recipe, with size, crop, flip and augmentation.
        name: the argument's name in the method's `forward`.
        masks: masks of the view; None for none.
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


def same_crops(view: View, name: str, size: tuple[int, int], interpolation: str) -> View:
    """Make a view of another's crops as stored, for a network of its own size and normalisation.

    Args:
        view: the view whose crops it shows.
        name: the argument's name in the method's `forward`.
        size: (height, width) in pixels.
        interpolation: bicubic, bilinear or lanczos.
    """
    return View(
        name=name,
        size=size,
        count=view.count,
        like=view.name,
        interpolation=interpolation,
        normalised=False,
    )


def numbered(inputs: Inputs) -> Iterator[Numbered]:
    """The views among inputs, each with the number of its first stream."""
    firsts: dict[str, int] = {}
    counts: dict[str, int] = {}
    following = 0
    for view in inputs:
        if not isinstance(view, View):
            continue
        if view.like:
            assert view.like in firsts, f"{view.name} is like {view.like}, which is not declared"
            assert view.count <= counts[view.like], f"{view.like} has fewer crops than {view.name}"
            firsts[view.name] = firsts[view.like]
        else:
            firsts[view.name] = following
            following += view.count
        counts[view.name] = view.count
        yield Numbered(view, firsts[view.name])


def counted(inputs: Inputs) -> Iterator[Numbered]:
    """The views whose hidden patches are counted over the global batch."""
    for view, first in numbered(inputs):
        if view.masks is not None and view.masks.mean_name:
            yield Numbered(view, first)


def make_inputs(
    inputs: Inputs, picture: Picture, *, seed: int, epoch: int, index: int, channels: int
) -> dict[str, np.ndarray]:
    """Crop, augment and mask one picture; a pure function of its arguments.

    The picture is decoded once, at the lowest resolution that has twice the pixels of every view
    along each side.

    Args:
        inputs: the method's declared inputs.
        picture: the picture, not yet decoded.
        seed: the run's seed.
        epoch: the sample's epoch.
        index: the sample's index, also if another picture substitutes its own.
        channels: 1 for grayscale, 3 for RGB.

    Returns:
        Arrays by name: pictures uint8 [C, H, W], masks bool [N], labels int64 [], numbers float32
        [D]; with an axis in front for more than one.

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
    enough = max(width for width, _ in wanted), max(height for _, height in wanted)
    pixels = picture.decoded(enough, _needed(list(crops.values())))
    if channels == 1:
        pixels = to_pixels(to_image(pixels).convert("L"))
    made: dict[str, np.ndarray] = {}
    for view, first in views:
        made[view.name] = _stack(
            [crops[first + k].cut(view, pixels, picture.size) for k in range(view.count)]
        )
        if view.masks is not None:
            made[view.masks.name] = draw_masks(view, first, seed=seed, epoch=epoch, index=index)
    for wanted_input in inputs:
        if isinstance(wanted_input, Labels):
            assert picture.label is not None
            made[wanted_input.name] = np.asarray(picture.label, dtype=np.int64)
        elif isinstance(wanted_input, Numbers):
            drawn = wanted_input.draw(generator(seed, Stream.NUMBERS, epoch, index))
            made[wanted_input.name] = drawn.astype(np.float32)
    return made


def draw_masks(view: View, first: int, *, seed: int, epoch: int, index: int = 0) -> np.ndarray:
    """Draw the masks of one picture's views.

    Args:
        view: a view that has masks.
        first: number of the view's first stream.
        seed: the run's seed.
        epoch: the sample's epoch.
        index: the sample's index.

    Returns:
        bool [views, masks, N], without axes of length 1.
    """
    assert view.masks is not None
    found = []
    for k in range(view.count):
        rng = generator(seed, Stream.MASK, epoch, index, first + k)
        found.append(_stack([view.masks.draw(rng) for _ in range(view.masks.count)]))
    return _stack(found)


def whole_picture(view: View, image: Image.Image) -> np.ndarray:
    """The whole picture resized to a view's size, once for each of the view's `count`."""
    return _stack([inference_view(image, view.size, view.interpolation)] * view.count)


class _Crop:
    """A random crop and flip of a picture, with the generator for its augmentations."""

    def __init__(self, view: View, size: tuple[int, int], rng: np.random.Generator) -> None:
        self.box: Box = random_crop_box(rng, size, view.crop_scale, view.crop_ratio)
        self.flip = bool(rng.random() < view.hflip)
        self._rng = rng
        self.before = view.before
        self._changed: Pixels | None = None

    def enough(self, size: tuple[int, int], view_size: tuple[int, int]) -> tuple[int, int]:
        """The whole picture's (width, height) at which the crop has the view's size, pixels."""
        left, top, right, bottom = self.box
        height, width = view_size
        return (
            int(np.ceil(size[0] * width / (right - left))),
            int(np.ceil(size[1] * height / (bottom - top))),
        )

    def cut(self, view: View, pixels: Pixels, size: tuple[int, int]) -> np.ndarray:
        """Cut a view, uint8 [C, H, W]; the view that the crop was drawn for must be the first."""
        if self._changed is None:
            self._changed = _transformed(pixels, self.before, self._rng)
        pixels = self._changed
        box = _scaled(self.box, size, (pixels.shape[1], pixels.shape[0]))
        found = resampled(pixels, view.size, view.interpolation, box)
        if not view.after:
            return to_planes(found, flip=self.flip)
        found = found[:, ::-1] if self.flip else found
        return to_planes(_transformed(np.ascontiguousarray(found), view.after, self._rng))


def _needed(crops: Sequence[_Crop]) -> tuple[int, int] | None:
    """The rows of a picture that crops are cut from; None for all."""
    if any(crop.before for crop in crops):  # what changes a picture may look at all of it
        return None
    tops, bottoms = zip(*((crop.box[1], crop.box[3]) for crop in crops), strict=True)
    return math.floor(min(tops)), math.ceil(max(bottoms))


def _scaled(box: Box, size: tuple[int, int], decoded_size: tuple[int, int]) -> IntBox:
    """A box of a picture in pixels of what was decoded of it, rounded.

    A picture that is decoded at a lower scale has twice the pixels of every view, so that rounding
    moves an edge by a quarter of the view's pixels at most.
    """
    across, down = decoded_size[0] / size[0], decoded_size[1] / size[1]
    left, top, right, bottom = box
    return round(left * across), round(top * down), round(right * across), round(bottom * down)


def _transformed(
    pixels: Pixels, transforms: Sequence[Transform], rng: np.random.Generator
) -> Pixels:
    if not transforms:
        return pixels
    image = to_image(pixels)
    for change in transforms:
        image = change(rng, image)
    return to_pixels(image)


def _stack(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.stack(arrays)
