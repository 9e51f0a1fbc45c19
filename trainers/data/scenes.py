"""Drawn scenes with known labels: textured shapes on photographs, one class a shape.

Texture and colour say nothing about the class, so that a shape must be seen to be told.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from mimray.trainers.data.rng import Stream, generator
from mimray.trainers.data.sample_photos import PHOTOGRAPHS, photograph, regions_of
from mimray.trainers.data.transforms import random_crop_box

SHAPES = ("disc", "rectangle", "triangle", "star", "ring", "cross", "crescent", "arrow")
MAX_OBJECTS = 5

# Edges are drawn this many times finer, then averaged.
_FINER = 4
# A shape is drawn at this radius at least, over the picture's short side, and at most.
_RADIUS = (0.14, 0.28)
# An object of which less is left is taken out of the scene.
_VISIBLE = 0.4
# A pixel belongs to what covers more of it than all else; where that is not this much, to none.
_OWNED = 0.75
_TEXTURES = ("flat", "stripes", "checks", "dots", "clouds")
# Two colours of a texture differ by this much at least, of 255 a channel.
_CONTRAST = 80


@dataclass(frozen=True)
class Scene:
    """A drawn picture, and the owner of each pixel.

    Attributes:
        image: uint8 [H, W, 3].
        owners: int64 [H, W], i + 1 where object i is seen, 0 where the background is.
        void: bool [H, W], pixels on an edge, which are partly this and partly that.
        labels: int64 [N], index into `SHAPES` of each object; those later lie on top.
    """

    image: np.ndarray
    owners: np.ndarray
    void: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, eq=False)
class _Object:
    """A shape in its place: its class, its cover of each pixel [H, W] and its colours [H, W, 3]."""

    label: int
    cover: np.ndarray
    colours: np.ndarray


def draw_scene(
    seed: int, index: int, *, image_size: tuple[int, int], num_classes: int, held_out: bool
) -> Scene:
    """Draw one scene, a pure function of its arguments.

    Args:
        seed: seed of the set.
        index: index of the scene in its split; the class of the object on top, which is never taken
            out, is `index` modulo the number of classes, so that all of them occur.
        image_size: (height, width), pixels.
        num_classes: number of `SHAPES` that occur.
        held_out: True takes the background from the parts of the photographs that training never
            shows.
    """
    rng = generator(seed, Stream.SCENE, int(held_out), index)
    background = _background(rng, image_size, held_out)
    labels = rng.integers(num_classes, size=rng.integers(1, MAX_OBJECTS, endpoint=True))
    labels[-1] = index % num_classes
    objects = [_draw_object(rng, int(label), image_size) for label in labels]
    while hidden := _most_hidden(objects):
        objects.remove(hidden)
    shares = _visible(objects)
    image = background
    for thing in objects:
        image += thing.cover[..., None] * (thing.colours - image)
    return Scene(
        image=image.round().clip(0, 255).astype(np.uint8),
        owners=shares.argmax(axis=0),
        void=shares.max(axis=0) < _OWNED,
        labels=np.array([thing.label for thing in objects]),
    )


def _visible(objects: list[_Object]) -> np.ndarray:
    """Share of each pixel that shows the background and each object, float64 [N + 1, H, W]."""
    left = np.ones_like(objects[0].cover)
    shares = []
    for thing in reversed(objects):
        shares.append(left * thing.cover)
        left = left * (1 - thing.cover)
    return np.stack([left, *reversed(shares)])


def _most_hidden(objects: list[_Object]) -> _Object | None:
    """The object of which too little is left, and least; None where all can be told."""
    seen = _visible(objects)[1:].sum(axis=(1, 2))
    whole = np.array([thing.cover.sum() for thing in objects])
    worst = int((seen / whole).argmin())
    return objects[worst] if seen[worst] < _VISIBLE * whole[worst] else None


def _background(
    rng: np.random.Generator, image_size: tuple[int, int], held_out: bool
) -> np.ndarray:
    """A crop of a photograph at the scene's size, float64 [H, W, 3]."""
    height, width = image_size
    photo = _photo(sorted(PHOTOGRAPHS)[rng.integers(len(PHOTOGRAPHS))])
    regions = regions_of(photo.size)[held_out]
    left, top, right, bottom = regions[rng.integers(len(regions))]
    box = random_crop_box(
        rng, (right - left, bottom - top), (0.2, 1.0), (width / height, width / height)
    )
    crop = (box[0] + left, box[1] + top, box[2] + left, box[3] + top)
    pixels = np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC, box=crop))
    return (pixels[:, ::-1] if rng.random() < 0.5 else pixels).astype(np.float64)


@cache
def _photo(name: str) -> Image.Image:
    return photograph(name)


def _draw_object(rng: np.random.Generator, label: int, image_size: tuple[int, int]) -> _Object:
    height, width = image_size
    radius = min(image_size) * rng.uniform(*_RADIUS)
    centre = rng.uniform(0.5 * radius, np.array([width, height]) - 0.5 * radius)
    angle, aspect = rng.uniform(0, 2 * np.pi), rng.uniform(0.7, 1.0)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])

    canvas = Image.new("L", (width * _FINER, height * _FINER))
    draw = ImageDraw.Draw(canvas)
    for points, fill in _outline(SHAPES[label]):
        placed = (points * [radius, radius * aspect]) @ turn.T + centre
        draw.polygon([(x, y) for x, y in placed * _FINER], fill=fill)
    cover = np.asarray(canvas.reduce(_FINER), np.float64) / 255  # H W

    rows, columns = np.mgrid[:height, :width] + 0.5
    places = np.stack([columns - centre[0], rows - centre[1]], axis=-1) @ turn  # H W 2
    return _Object(label, cover, _paint(rng, places[..., 0], places[..., 1], radius))


def _outline(shape: str) -> list[tuple[np.ndarray, int]]:
    """Polygons [P, 2] within the unit circle, each filled (255) or cut out (0), in this order."""
    if shape == "disc":
        return [(_on_circle(48), 255)]
    if shape == "rectangle":
        return [(_on_circle(4, np.pi / 4), 255)]
    if shape == "triangle":
        return [(_on_circle(3), 255)]
    if shape == "star":
        points = _on_circle(10)
        points[1::2] *= 0.42
        return [(points, 255)]
    if shape == "ring":
        return [(_on_circle(48), 255), (_on_circle(48) * 0.55, 0)]
    if shape == "cross":
        a, b = 0.32, 0.95
        corner = np.array([(b, -a), (b, a), (a, a)])
        quarter = np.array([[0, -1], [1, 0]])
        turns = [np.linalg.matrix_power(quarter, number) for number in range(4)]
        return [(np.concatenate([corner @ turn.T for turn in turns]), 255)]
    if shape == "crescent":
        return [(_on_circle(48), 255), (_on_circle(48) * 0.85 + (0.5, 0.0), 0)]
    assert shape == "arrow"
    upper = np.array([(1, 0), (0.1, 0.75), (0.1, 0.28), (-0.95, 0.28)])
    return [(np.concatenate([upper, upper[:0:-1] * (1, -1)]), 255)]


def _on_circle(count: int, start: float = 0.0) -> np.ndarray:
    angles = start + np.arange(count) * 2 * np.pi / count
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _paint(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    """Colours float64 [H, W, 3] of a texture over the object's own coordinates, in pixels."""
    one, other = rng.uniform(0, 255, (2, 3))
    if np.abs(one - other).max() < _CONTRAST:
        other = (one + 128) % 256
    texture = _TEXTURES[rng.integers(len(_TEXTURES))]
    period = max(3.0, radius * rng.uniform(0.3, 0.6))
    weight = np.zeros_like(u)
    if texture == "stripes":
        weight = 0.5 + 0.5 * np.sin(2 * np.pi * u / period)
    elif texture == "checks":
        weight = (np.floor(u / period) + np.floor(v / period)) % 2
    elif texture == "dots":
        weight = (np.hypot(u / period % 1 - 0.5, v / period % 1 - 0.5) < 0.3).astype(np.float64)
    elif texture == "clouds":
        grain = Image.fromarray(rng.random((6, 6)).astype(np.float32))
        size = u.shape[1], u.shape[0]
        weight = np.asarray(grain.resize(size, Image.Resampling.BICUBIC), np.float64)
    colours: np.ndarray = one + weight[..., None] * (other - one)
    return colours
