from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as reference

from mimray.trainers.errors import DataError, EmptyDatasetError
from mimray.trainers.evaluation.annotations.base import InvalidLabels
from mimray.trainers.evaluation.annotations.coco import CocoDetection

HEIGHT, WIDTH = 40, 60
BLOB = np.zeros((HEIGHT, WIDTH), np.uint8)
BLOB[5:20, 10:33] = 1
BLOB[9:12, 15:20] = 0
POLYGONS = [[5.0, 5.0, 30.5, 6.2, 28.0, 30.0, 4.1, 22.0], [40, 10, 55, 10, 47, 20]]


def _uncompressed(mask: np.ndarray) -> dict[str, Any]:
    flat = mask.ravel(order="F")
    cuts = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], cuts, [flat.size]])).tolist()
    return {"size": list(mask.shape), "counts": counts if flat[0] == 0 else [0, *counts]}


def _compressed(mask: np.ndarray) -> dict[str, Any]:
    packed = reference.encode(np.asfortranarray(mask))
    return {"size": packed["size"], "counts": packed["counts"].decode()}


def _thing(number: int, **more: Any) -> dict[str, Any]:
    thing = {"id": number, "image_id": 7, "category_id": 30, "bbox": [10, 5, 23, 15], "iscrowd": 0}
    return thing | {"segmentation": _uncompressed(BLOB)} | more


TREE: dict[str, Any] = {
    "images": [
        {"id": 7, "file_name": "a.png", "height": HEIGHT, "width": WIDTH},
        {"id": 3, "file_name": "deep/b.png", "height": HEIGHT, "width": WIDTH, "license": 1},
    ],
    "annotations": [
        _thing(1, area=333.5),
        _thing(2, category_id=4, segmentation=_compressed(BLOB)),
        _thing(9, bbox=[4, 5, 51, 25], segmentation=POLYGONS, iscrowd=1),
    ],
    "categories": [{"id": 30, "name": "cat"}, {"id": 4, "name": "dog", "supercategory": "pet"}],
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes a file and its pictures; takes a function that spoils the tree first."""

    def writes(spoil: Callable[[dict[str, Any]], object] = lambda tree: None) -> str:
        (tmp_path / "images" / "deep").mkdir(parents=True, exist_ok=True)
        for name in ("a.png", "deep/b.png"):
            Image.new("RGB", (WIDTH, HEIGHT), (9, 200, 30)).save(tmp_path / "images" / name)
        tree = copy.deepcopy(TREE)
        spoil(tree)
        file = tmp_path / "instances.json"
        file.write_text(json.dumps(tree))
        return str(file)

    return writes


def _open(uri: str, skip: bool = False) -> tuple[CocoDetection, InvalidLabels]:
    invalid_labels = InvalidLabels(skip)
    return CocoDetection(uri, None, invalid_labels), invalid_labels


def test_reader__gives_objects_classes_and_sizes(write: Callable[..., str]) -> None:
    data, _ = _open(write())
    assert len(data) == 2
    assert data.class_names == ("dog", "cat")  # in the order of ids
    assert data.has_masks
    example = data[0]
    assert example.image_id == 7
    assert example.image.size == (WIDTH, HEIGHT)
    assert example.boxes.tolist() == [[10, 5, 33, 20], [10, 5, 33, 20], [4, 5, 55, 30]]
    assert example.labels.tolist() == [1, 0, 1]
    assert example.crowd.tolist() == [False, False, True]
    assert example.areas[:2].tolist() == [333.5, BLOB.sum()]
    assert data.labels(0).tolist() == [1, 0]  # without the crowd
    empty = data[1]
    assert empty.boxes.shape == (0, 4)
    assert empty.masks is not None
    assert empty.masks.shape == (0, HEIGHT, WIDTH)
    assert data.name(1).endswith("images/deep/b.png")


def test_masks__equal_pycocotools(write: Callable[..., str]) -> None:
    data, _ = _open(write())
    masks = data[0].masks
    assert masks is not None
    assert masks.dtype == bool
    assert (masks[0] == BLOB).all()
    assert (masks[1] == BLOB).all()
    polygons = reference.merge(reference.frPyObjects(POLYGONS, HEIGHT, WIDTH))
    assert (masks[2] == reference.decode(polygons)).all()
    assert data[0].areas[2] == reference.area(polygons)


def test_has_masks__only_where_every_object_has_one(write: Callable[..., str]) -> None:
    data, _ = _open(write(lambda tree: tree["annotations"][1].pop("segmentation")))
    assert not data.has_masks
    assert data[0].masks is None
    assert data[0].areas.tolist() == [333.5, 23 * 15, 51 * 25]


def test_box__a_pixel_beyond_the_picture_is_cut(write: Callable[..., str]) -> None:
    data, _ = _open(write(lambda tree: tree["annotations"][0].update(bbox=[-0.5, 3, 61, 37.4])))
    assert data[0].boxes[0].tolist() == [0, 3, WIDTH, HEIGHT]


def test_fingerprint__changes_with_labels_and_pictures(
    write: Callable[..., str], tmp_path: Path
) -> None:
    first = _open(write())[0].fingerprint
    assert _open(write())[0].fingerprint == first
    labels = _open(write(lambda tree: tree["annotations"][0].update(category_id=4)))[0]
    uri = write()
    Image.effect_noise((WIDTH, HEIGHT), 50).save(tmp_path / "images" / "a.png")
    assert len({first, labels.fingerprint, _open(uri)[0].fingerprint}) == 3


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unknown category": (
        lambda t: t["annotations"][1].update(category_id=5),
        r"annotation 2: there is no category 5",
    ),
    "unknown image": (
        lambda t: t["annotations"][1].update(image_id=99),
        r"annotation 2: there is no image 99",
    ),
    "double annotation": (
        lambda t: t["annotations"][1].update(id=1),
        r"annotation 1: another annotation has the same id",
    ),
    "double image": (
        lambda t: t["images"][1].update(id=7),
        r"image 7: another image has the same id",
    ),
    "zero area": (
        lambda t: t["annotations"][1].update(bbox=[5, 5, 0, 9]),
        r"annotation 2: the box .* has no area",
    ),
    "negative area": (
        lambda t: t["annotations"][1].update(bbox=[9, 5, 4, -3]),
        r"annotation 2: the box .* has no area",
    ),
    "outside": (
        lambda t: t["annotations"][1].update(bbox=[40, 5, 30, 9]),
        r"annotation 2: the box \(40, 5, 70, 14\) lies outside the picture of 60x40",
    ),
    "just outside": (
        lambda t: t["annotations"][1].update(bbox=[60.2, 5, 0.5, 9]),
        r"annotation 2: the box .* lies outside",
    ),
    "mask of another size": (
        lambda t: t["annotations"][1].update(segmentation=_uncompressed(BLOB.T)),
        r"annotation 2: its mask is 40x60, the picture 60x40",
    ),
    "runs too short": (
        lambda t: t["annotations"][0]["segmentation"]["counts"].pop(),
        r"annotation 1: its mask's runs come to",
    ),
    "polygon of two points": (
        lambda t: t["annotations"][2].update(segmentation=[[1, 2, 3, 4]]),
        r"annotation 9: a polygon of its mask",
    ),
    "picture missing": (
        lambda t: t["images"][1].update(file_name="c.png"),
        r"image 3: there is no picture .*c\.png",
    ),
    "picture of another size": (
        lambda t: t["images"][1].update(width=61),
        r"image 3: .*b\.png has 60x40 pixels, its labels are for 61x40",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault__is_an_error_that_names_file_and_id(write: Callable[..., str], fault: str) -> None:
    spoil, message = FAULTS[fault]
    uri = write(spoil)
    with pytest.raises(DataError, match=message) as raised:
        _open(uri)
    assert uri in str(raised.value)
    assert "--skip-invalid" in str(raised.value)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault__is_left_out_and_listed_on_request(write: Callable[..., str], fault: str) -> None:
    spoil, _ = FAULTS[fault]
    data, invalid_labels = _open(write(spoil), skip=True)
    assert len(invalid_labels.found) == 1
    objects = sum(len(data[index].labels) for index in range(len(data)))
    of_picture = "image" in invalid_labels.found[0].split(": ")[1]
    assert (len(data), objects) == ((1, 3) if of_picture else (2, 2))


def test_file__that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no annotation file at .*none\.json"):
        _open(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Invalid JSON"),
        ('{"images": []}', "annotations: Field required"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', r"images\[0\]\.file_name"),
    ],
)
def test_file__of_another_layout_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "labels.json"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        _open(str(file))


def test_categories__must_differ(write: Callable[..., str]) -> None:
    with pytest.raises(DataError, match="share an id or a name"):
        _open(write(lambda tree: tree["categories"][1].update(name="cat")))


def test_no_picture__is_an_error(write: Callable[..., str]) -> None:
    def spoil(tree: dict[str, Any]) -> None:
        for image in tree["images"]:
            image["height"] = 2

    with pytest.raises(EmptyDatasetError, match="no picture that can be used"):
        _open(write(spoil), skip=True)


def test_pictures__nowhere_is_an_error(write: Callable[..., str]) -> None:
    def spoil(tree: dict[str, Any]) -> None:
        for image in tree["images"]:
            image["file_name"] = "elsewhere/" + image["file_name"]

    with pytest.raises(DataError, match="none of its pictures is where it should be"):
        _open(write(spoil))


def test_picture__that_cannot_be_decoded_is_named(
    write: Callable[..., str], tmp_path: Path
) -> None:
    uri = write()
    whole = (tmp_path / "images" / "a.png").read_bytes()
    (tmp_path / "images" / "a.png").write_bytes(whole[:60])
    data, _ = _open(uri)  # its header is well
    with pytest.raises(DataError, match=r"a\.png"):
        data[0]
