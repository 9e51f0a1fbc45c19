from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimray.trainers.errors import DataError
from mimray.trainers.evaluation.annotations.masks import read_indices
from mimray.trainers.evaluation.annotations.pairs import PairFolder, pair_folders


def _write(folder: Path, names: str, mode: str = "L", value: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names.split():
        Image.new(mode, (8, 6), value).save(folder / name)


@pytest.mark.parametrize(
    ("images", "masks", "split"),
    [
        ("train", "trainannot", "train"),
        ("val/images", "val/masks", "val"),
        ("test/images", "test/labels", "test"),
        ("images/validation", "annotations/validation", "validation"),
        ("images/training", "labels/training", "training"),
        ("images", "masks", ""),
    ],
)
def test_pair_folders__the_usual_layouts(
    tmp_path: Path, images: str, masks: str, split: str
) -> None:
    _write(tmp_path / images, "b.jpg a.png", "RGB", 0)
    _write(tmp_path / masks, "a.png b.png")
    assert pair_folders(str(tmp_path)) == {split: (images, masks)}
    pairs = PairFolder(str(tmp_path), images, masks, ignore_index=255)
    assert len(pairs) == 2
    image, mask = pairs[1]
    assert image.size == (8, 6)
    assert mask.shape == (6, 8)
    assert mask.dtype == np.int64
    assert pairs.name(1) == str(tmp_path / images / "b.jpg")
    assert pairs.label_name(1) == str(tmp_path / masks / "b.png")


def test_pair_folders__several_splits_and_folders_below(tmp_path: Path) -> None:
    for split in ("train", "val"):
        _write(tmp_path / "images" / split / "city", "a.png", "RGB", 0)
        _write(tmp_path / "masks" / split / "city", "a.png")
    found = pair_folders(str(tmp_path))
    assert sorted(found) == ["train", "val"]
    pairs = PairFolder(str(tmp_path), *found["val"], ignore_index=255)
    assert pairs[0].mask.max() == 1
    assert pairs.name(0).endswith("images/val/city/a.png")


def test_pair_folders__pictures_alone_are_none(tmp_path: Path) -> None:
    _write(tmp_path / "train" / "cats", "a.png", "RGB", 0)
    assert pair_folders(str(tmp_path)) == {}


@pytest.mark.parametrize("place", ["train/classes.txt", "classes.txt"])
def test_pairs__class_names_from_a_file(tmp_path: Path, place: str) -> None:
    _write(tmp_path / "train/images", "a.png", "RGB", 0)
    _write(tmp_path / "train/masks", "a.png")
    (tmp_path / place).write_text("road\nside walk\n")
    pairs = PairFolder(str(tmp_path), "train/images", "train/masks", ignore_index=255)
    assert pairs.class_names == ("road", "side walk")


def test_pairs__what_is_wrong_is_named(tmp_path: Path) -> None:
    _write(tmp_path / "train", "a.png b.png c.png d.png", "RGB", 0)
    _write(tmp_path / "trainannot", "b.png", "RGB", 0)
    Image.new("L", (8, 5)).save(tmp_path / "trainannot/c.png")
    (tmp_path / "trainannot/d.png").write_bytes(b"\x89PNG no")
    pairs = PairFolder(str(tmp_path), "train", "trainannot", ignore_index=255)
    for index, message in enumerate(
        (
            "no mask of its name in .*trainannot",
            "trainannot/b.png holds colours",
            "trainannot/c.png is 8x5 pixels, its picture 8x6",
            "trainannot/d.png cannot be decoded",
        )
    ):
        with pytest.raises(DataError, match=message):
            pairs[index]


@pytest.mark.parametrize("mode", ["P", "L", "1", "I;16"])
def test_masks__every_way_to_store_numbers(tmp_path: Path, mode: str) -> None:
    values = np.arange(12).reshape(3, 4) % 2
    if mode == "I;16":
        values = values * 300
        Image.fromarray(values.astype(np.uint16)).save(tmp_path / "a.png")
    elif mode == "P":
        image = Image.fromarray(values.astype(np.uint8), "P")
        image.putpalette([255, 0, 0, 0, 255, 0])
        image.save(tmp_path / "a.png")
    else:
        Image.fromarray(values.astype(np.uint8)).point(
            lambda value: 255 * value if mode == "1" else value, mode
        ).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_indices(str(tmp_path / "a.png")), values)
