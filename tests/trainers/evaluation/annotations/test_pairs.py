from __future__ import annotations

import struct
from pathlib import Path
from zlib import compress, crc32

import numpy as np
import pytest
from PIL import Image

from mimray.trainers.errors import DataError
from mimray.trainers.evaluation.annotations.base import InvalidLabels
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
        ("Train/Images", "Train/Masks", "train"),
        ("Images", "Labels", ""),
    ],
)
def test_pair_folders__the_usual_layouts(
    tmp_path: Path, images: str, masks: str, split: str
) -> None:
    _write(tmp_path / images, "b.jpg a.png", "RGB", 0)
    _write(tmp_path / masks, "a.png b.png")
    assert pair_folders(str(tmp_path)) == {split: (images, masks)}
    pairs = PairFolder(
        str(tmp_path), images, masks, ignore_index=255, invalid_labels=InvalidLabels(False)
    )
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
    pairs = PairFolder(
        str(tmp_path), *found["val"], ignore_index=255, invalid_labels=InvalidLabels(False)
    )
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
    pairs = PairFolder(
        str(tmp_path),
        "train/images",
        "train/masks",
        ignore_index=255,
        invalid_labels=InvalidLabels(False),
    )
    assert pairs.class_names == ("road", "side walk")


def test_pairs__what_is_wrong_is_named(tmp_path: Path) -> None:
    _write(tmp_path / "train", "a.png b.png c.png d.png", "RGB", 0)
    _write(tmp_path / "trainannot", "b.png", "RGB", 9)
    Image.new("L", (8, 5)).save(tmp_path / "trainannot/c.png")
    (tmp_path / "trainannot/d.png").write_bytes(b"\x89PNG no")
    pairs = PairFolder(
        str(tmp_path), "train", "trainannot", ignore_index=255, invalid_labels=InvalidLabels(False)
    )
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


def _pairs(folder: Path) -> tuple[PairFolder, InvalidLabels]:
    invalid_labels = InvalidLabels(False)
    pairs = PairFolder(
        str(folder), "images", "masks", ignore_index=255, invalid_labels=invalid_labels
    )
    return pairs, invalid_labels


def test_pairs__masks_without_a_picture_are_counted(tmp_path: Path) -> None:
    _write(tmp_path / "images", "a.b.jpg", "RGB", 0)
    _write(tmp_path / "masks", "a.b.png c.png d.png")
    pairs, invalid_labels = _pairs(tmp_path)
    assert pairs[0].mask.max() == 1
    assert dict(invalid_labels.adapted) == {"masks without a picture of their name passed over": 2}


@pytest.mark.parametrize(
    ("images", "masks", "message"),
    [
        ("a.jpg", "a.png a.bmp", r"two masks of its name, a\.bmp and a\.png"),
        ("a.jpg a.png", "a.png", "another picture of .*images has its name"),
    ],
)
def test_pairs__one_name_twice_is_refused(
    tmp_path: Path, images: str, masks: str, message: str
) -> None:
    _write(tmp_path / "images", images, "RGB", 0)
    _write(tmp_path / "masks", masks)
    with pytest.raises(DataError, match=message):
        _pairs(tmp_path)[0][0]


def test_class_names__with_a_mark_and_blank_lines(tmp_path: Path) -> None:
    _write(tmp_path / "images", "a.png", "RGB", 0)
    _write(tmp_path / "masks", "a.png")
    (tmp_path / "classes.txt").write_bytes("\ufeffroad\r\n side walk \r\n\r\n\r\n".encode())
    assert _pairs(tmp_path)[0].class_names == ("road", "side walk")
    (tmp_path / "classes.txt").write_text("road\n\nsky\n")
    with pytest.raises(DataError, match=r"classes\.txt: line 2 is blank"):
        _pairs(tmp_path)


def test_pairs__a_picture_that_exif_turns(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    _write(tmp_path / "masks", "a.png")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 6)).save(tmp_path / "images/a.jpg", exif=exif)
    pairs, _ = _pairs(tmp_path)
    assert pairs.is_turned(0)
    with pytest.raises(DataError, match=r"8x6 pixels, its picture 6x8 once EXIF has turned it"):
        pairs[0]


VALUES = np.arange(12).reshape(3, 4) % 3


@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "a.jp2", "a.gif", "jpeg-inside.tif"])
def test_masks__compressed_with_loss_are_refused(tmp_path: Path, name: str) -> None:
    options = {"compression": "jpeg"} if name.endswith("tif") else {}
    Image.fromarray(VALUES.astype(np.uint8)).save(tmp_path / name, **options)
    with pytest.raises(DataError, match=r"which changes indices \(save masks as PNG"):
        read_indices(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, "uint8") for name in ("a.png", "a.bmp", "a.tif", "a.pgm")),
        *((name, "RGB") for name in ("a.png", "a.bmp", "a.tif", "a.ppm")),
        *((name, "uint16") for name in ("a.png", "a.tif", "a.pgm")),
        ("a.tif", "float32"),
    ],
)
def test_masks__the_same_numbers_in_other_files(tmp_path: Path, name: str, mode: str) -> None:
    if mode == "RGB":
        image = Image.fromarray(VALUES.astype(np.uint8)).convert("RGB")
    else:
        image = Image.fromarray(VALUES.astype(mode))
    image.save(tmp_path / name)
    np.testing.assert_array_equal(read_indices(str(tmp_path / name)), VALUES)


def test_masks__colours_and_fractions_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 3), (128, 0, 0)).save(tmp_path / "a.png")
    Image.fromarray(np.full((3, 4), 0.5, np.float32)).save(tmp_path / "b.tif")
    Image.new("RGBA", (4, 3), (1, 1, 1, 0)).save(tmp_path / "c.png")
    for name in ("a.png", "b.tif", "c.png"):
        with pytest.raises(DataError, match=rf"{name} holds colours .*the class of each pixel"):
            read_indices(str(tmp_path / name))


@pytest.mark.parametrize("depth", [2, 4])
def test_masks__gray_of_few_bits_is_not_spread(tmp_path: Path, depth: int) -> None:
    """Pillow shows such gray as 0 to 255; stored are the numbers 0 to 3 or 0 to 15."""
    per_byte = 8 // depth
    rows = b"".join(
        b"\0"
        + bytes(
            sum(int(v) << (8 - depth * (k + 1)) for k, v in enumerate(row[i : i + per_byte]))
            for i in range(0, 4, per_byte)
        )
        for row in VALUES
    )

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc32(kind + body))

    header = struct.pack(">IIBBBBB", 4, 3, depth, 0, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", compress(rows)), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
    (tmp_path / "a.png").write_bytes(content)
    np.testing.assert_array_equal(read_indices(str(tmp_path / "a.png")), VALUES)


def test_class_names__may_hold_separators_that_are_no_line_ends(tmp_path: Path) -> None:
    _write(tmp_path / "images", "a.png", "RGB", 0)
    _write(tmp_path / "masks", "a.png")
    (tmp_path / "classes.txt").write_bytes("sky\u2028high\r\nroad\n\n".encode())
    pairs = PairFolder(
        str(tmp_path), "images", "masks", ignore_index=255, invalid_labels=InvalidLabels(False)
    )
    assert pairs.class_names == ("sky\u2028high", "road")
