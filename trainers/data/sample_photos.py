"""Real photographs that are on every installation: those inside two libraries' wheels.

scikit-image and scikit-learn ship a few photographs for their own examples. Cut into tiles
they make a small labelled dataset for the demo and for first steps, without any download.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from mimray.trainers.data.decode import decode_rgb, resized_short_side
from mimray.trainers.errors import DataError

# Class name -> (package, file in it). One of each stereo pair, no drawings, no text.
PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "brick": ("skimage", "data/brick.png"),
    "camera": ("skimage", "data/camera.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "coffee": ("skimage", "data/coffee.png"),
    "coins": ("skimage", "data/coins.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "grass": ("skimage", "data/grass.png"),
    "gravel": ("skimage", "data/gravel.png"),
    "hubble": ("skimage", "data/hubble_deep_field.jpg"),
    "ihc": ("skimage", "data/ihc.png"),
    "moon": ("skimage", "data/moon.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
}

# Larger photographs are shrunk first, so that a tile shows a comparable part of each.
_SHORT_SIDE_PX = 512
# Held-out tiles come from this part of the long side; there is training on both sides of it.
_HELD_OUT = (0.50, 0.75)

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


def write_photo_tiles(
    out_dir: Path, *, size_px: int = 96, train_tiles: int = 200, val_tiles: int = 40
) -> tuple[Path, Path]:
    """Cut the photographs into overlapping tiles, one class a photograph.

    Train and held-out tiles share no pixel: a band across each photograph is kept for the
    latter. The same call always writes the same files.

    Args:
        out_dir: gets `train/<photograph>/*.jpg` and `val/<photograph>/*.jpg`.
        size_px: side of a tile.
        train_tiles: tiles of each photograph for training.
        val_tiles: held-out tiles of each photograph.

    Returns:
        The folders `train` and `val`.

    Raises:
        DataError: when one of these folders exists, or the tiles are too large.
    """
    train_dir, val_dir = out_dir / "train", out_dir / "val"
    for folder in (train_dir, val_dir):
        if folder.exists():
            raise DataError(f"{folder} exists already", hint="remove it or name another folder")
    for name in PHOTOGRAPHS:
        photo = photograph(name)
        train, held_out = regions_of(photo.size)
        for folder, regions, count in (
            (train_dir / name, train, train_tiles),
            (val_dir / name, held_out, val_tiles),
        ):
            folder.mkdir(parents=True)
            boxes = _spread(regions, size_px, count)
            if len(boxes) < count:
                raise DataError(
                    f"{name} gives only {len(boxes)} of {count} tiles of {size_px} px",
                    hint="ask for fewer or smaller tiles",
                )
            for number, box in enumerate(boxes):
                path = folder / f"{name}-{number:04d}.jpg"
                photo.crop(box).save(path, quality=95, subsampling="4:4:4")
    return train_dir, val_dir


def photograph(name: str) -> Image.Image:
    """One of `PHOTOGRAPHS`, RGB, its short side at most 512 pixels."""
    package, file = PHOTOGRAPHS[name]
    # Found, not imported: both packages take seconds to import.
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return resized_short_side(
        decode_rgb((Path(spec.origin).parent / file).read_bytes()), _SHORT_SIDE_PX
    )


def regions_of(size: tuple[int, int]) -> tuple[list[Box], list[Box]]:
    """Split a picture of (width, height) across its long side: for training, and held out."""
    width, height = size
    start, end = (round(part * max(size)) for part in _HELD_OUT)
    if width >= height:
        return (
            [(0, 0, start, height), (end, 0, width, height)],
            [(start, 0, end, height)],
        )
    return (
        [(0, 0, width, start), (0, end, width, height)],
        [(0, start, width, end)],
    )


def _spread(regions: list[Box], size_px: int, count: int) -> list[Box]:
    """Lay `count` tiles evenly over the regions, overlapping as much as that takes."""
    boxes: list[Box] = []
    for stride_px in range(size_px, 0, -1):
        boxes = [box for region in regions for box in _grid(region, size_px, stride_px)]
        if len(boxes) >= count:
            break
    kept = np.linspace(0, len(boxes) - 1, min(count, len(boxes))).round().astype(int)
    return [boxes[i] for i in kept]


def _grid(region: Box, size_px: int, stride_px: int) -> Iterator[Box]:
    left, top, right, bottom = region
    for y in range(top, bottom - size_px + 1, stride_px):
        for x in range(left, right - size_px + 1, stride_px):
            yield (x, y, x + size_px, y + size_px)
