"""A labelled scene set that needs no download: every kind of label, in the formats of the field."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mimray.trainers.data.scenes import SHAPES, Scene, draw_scene
from mimray.trainers.errors import DataError, StorageError

VOID = 255
CLASSES = "classes.txt"
BACKGROUND = "background"
MIN_SIDE_PX = 32

# An object's crop is this much larger than its box.
_CROP_MARGIN = 1.15


def write_scenes(
    out_dir: Path,
    *,
    num_train: int = 64,
    num_val: int = 32,
    image_size: tuple[int, int] = (96, 96),
    num_classes: int = 5,
    seed: int = 0,
    overwrite: bool = False,
) -> tuple[Path, Path]:
    """Write scenes of textured shapes on photographs, with all their labels.

    Each of `train/` and `val/` gets `images/*.jpg`; `masks/*.png`, index PNGs with 0 for the
    background, k + 1 for class k and 255 (void) on edges; `instances.json`, COCO detection with
    instance masks as run lengths, whose category k + 1 is class k; `panoptic.json` and
    `panoptic/*.png`, COCO panoptic with the background as category 0; and `classes.txt`, a name
    a line, the background first. `crops/train/<class>/` and `crops/val/<class>/` hold each
    object cut out. Training and held-out backgrounds share no pixel.

    The same call writes the same bytes. The set appears whole or not at all.

    Args:
        out_dir: folder of the set, to be made.
        num_train: scenes for training.
        num_val: scenes held out.
        image_size: (height, width), pixels.
        num_classes: shapes that occur.
        seed: seed of the scenes.
        overwrite: replace an earlier set.

    Returns:
        The folders `train` and `val`.

    Raises:
        DataError: something is at `out_dir`, there are not so many shapes, or scenes are too small.
        StorageError: the set cannot be written.

    Source: https://cocodataset.org/#format-data
    """
    if not 2 <= num_classes <= len(SHAPES):
        raise DataError(
            f"{num_classes} classes are asked for", hint=f"there are 2 to {len(SHAPES)} shapes"
        )
    if min(image_size) < MIN_SIDE_PX:
        raise DataError(
            f"scenes of {image_size[0]}x{image_size[1]} pixels are too small to tell shapes in",
            hint=f"each side needs {MIN_SIDE_PX} pixels",
        )
    if out_dir.exists() and not (overwrite and _holds_scenes(out_dir)):
        raise DataError(
            f"{out_dir} exists already",
            hint="name another folder; --overwrite replaces an earlier set of scenes",
        )
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".{out_dir.name}-") as aside:
            whole = Path(aside) / "whole"
            for split, count in (("train", num_train), ("val", num_val)):
                _write_split(whole, split, count, image_size, SHAPES[:num_classes], seed)
            if out_dir.exists():
                shutil.rmtree(out_dir)
            whole.rename(out_dir)
    except OSError as error:
        raise StorageError(
            f"{out_dir} cannot be written: {error}", hint="check the space left and permissions"
        ) from error
    return out_dir / "train", out_dir / "val"


def _holds_scenes(folder: Path) -> bool:
    """True if a folder holds a set of scenes, and nothing beside it that would be lost."""
    if not folder.is_dir() or not (folder / "train" / CLASSES).is_file():
        return False
    return {entry.name for entry in folder.iterdir()} == {"train", "val", "crops"}


def _write_split(
    root: Path,
    split: str,
    count: int,
    image_size: tuple[int, int],
    classes: tuple[str, ...],
    seed: int,
) -> None:
    folder = root / split
    for name in ("images", "masks", "panoptic"):
        (folder / name).mkdir(parents=True)
    for name in classes:
        (root / "crops" / split / name).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    segments: list[dict[str, Any]] = []
    for index in range(count):
        scene = draw_scene(
            seed,
            index,
            image_size=image_size,
            num_classes=len(classes),
            held_out=split == "val",
        )
        stem = f"{index:06d}"
        picture = Image.fromarray(scene.image)
        picture.save(folder / "images" / f"{stem}.jpg", quality=95, subsampling="4:4:4")
        Image.fromarray(_class_mask(scene)).save(folder / "masks" / f"{stem}.png")
        ids = np.where(scene.void, 0, scene.owners + 1).astype(np.uint8)
        rgb = np.stack([ids, *np.zeros((2, *ids.shape), np.uint8)], axis=-1)
        Image.fromarray(rgb).save(folder / "panoptic" / f"{stem}.png")

        found = _annotations(scene, image_id=index + 1, first_id=len(objects) + 1)
        for number, thing in enumerate(found):
            crop = picture.crop(_square_around(thing["bbox"]))
            name = classes[int(scene.labels[number])]
            crop.save(root / "crops" / split / name / f"{stem}-{number}.png")
        height, width = image_size
        image = {"id": index + 1, "file_name": f"{stem}.jpg", "height": height, "width": width}
        images.append(image)
        objects += found
        segments.append(
            {
                "image_id": index + 1,
                "file_name": f"{stem}.png",
                "segments_info": _segments(scene, ids),
            }
        )
    things = [
        {"id": k + 1, "name": name, "supercategory": "shape"} for k, name in enumerate(classes)
    ]
    stuff = {"id": 0, "name": BACKGROUND, "supercategory": BACKGROUND, "isthing": 0}
    instances = {"images": images, "annotations": objects, "categories": things}
    panoptic = {
        "images": images,
        "annotations": segments,
        "categories": [stuff, *(thing | {"isthing": 1} for thing in things)],
    }
    (folder / "instances.json").write_text(json.dumps(instances))
    (folder / "panoptic.json").write_text(json.dumps(panoptic))
    (folder / CLASSES).write_text("\n".join((BACKGROUND, *classes)) + "\n")


def _class_mask(scene: Scene) -> np.ndarray:
    """Index mask, uint8 [H, W]."""
    classes = np.concatenate([[0], scene.labels + 1])[scene.owners]
    return np.where(scene.void, VOID, classes).astype(np.uint8)


def _annotations(scene: Scene, *, image_id: int, first_id: int) -> list[dict[str, Any]]:
    """COCO annotations of a scene: of each object, the part that is seen."""
    found = []
    for number, label in enumerate(scene.labels):
        mask = scene.owners == number + 1
        found.append(
            {
                "id": first_id + number,
                "image_id": image_id,
                "category_id": int(label) + 1,
                "bbox": _box_of(mask),
                "area": int(mask.sum()),
                "iscrowd": 0,
                "segmentation": {"size": list(mask.shape), "counts": _run_lengths(mask)},
            }
        )
    return found


def _segments(scene: Scene, ids: np.ndarray) -> list[dict[str, Any]]:
    """COCO panoptic segments of a scene; `ids` is the red of its PNG."""
    found = []
    for number in np.unique(ids[ids > 0]).tolist():
        mask = ids == number
        found.append(
            {
                "id": number,
                "category_id": 0 if number == 1 else int(scene.labels[number - 2]) + 1,
                "bbox": _box_of(mask),
                "area": int(mask.sum()),
                "iscrowd": 0,
            }
        )
    return found


def _box_of(mask: np.ndarray) -> list[int]:
    """Tight box of a mask, (left, top, width, height) in pixels."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    return [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]


def _run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's run lengths: down the columns, in turn outside and inside, outside first."""
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs: list[int] = np.diff([0, *edges, flat.size]).tolist()
    return [0, *runs] if flat[0] else runs


def _square_around(box: list[int]) -> tuple[int, int, int, int]:
    left, top, width, height = box
    side = round(_CROP_MARGIN * max(width, height))
    x, y = left + (width - side) // 2, top + (height - side) // 2
    return x, y, x + side, y + side
