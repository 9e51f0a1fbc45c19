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
from mimray.trainers.evaluation.annotations.pictures import TURNED

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


def _runs(counts: str | list[int]) -> dict[str, Any]:
    return {"size": [HEIGHT, WIDTH], "counts": counts}


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


def _objects(data: CocoDetection) -> int:
    return sum(len(data[index].labels) for index in range(len(data)))


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
    "runs that are no text of COCO's": (
        lambda t: t["annotations"][1].update(segmentation=_runs("zz!!")),
        r"annotation 2: its mask's runs are broken",
    ),
    "compressed runs too short": (
        lambda t: t["annotations"][1].update(segmentation=_runs("52")),
        r"annotation 2: its mask's runs are broken",
    ),
    "negative runs": (
        lambda t: t["annotations"][1].update(segmentation=_runs([-5, HEIGHT * WIDTH + 5])),
        r"annotation 2: its mask's runs are broken",
    ),
    "polygon that is not finite": (
        lambda t: t["annotations"][2].update(segmentation=[[float("nan")] * 6]),
        r"annotation 9: a polygon of its mask is not finite",
    ),
    "polygon of half a point": (
        lambda t: t["annotations"][2].update(segmentation=[[1, 2, 3, 4, 9, 9, 5]]),
        r"annotation 9: a polygon of its mask is not pairs",
    ),
    "neither box nor mask": (
        lambda t: t["annotations"][1].update(bbox=[], segmentation=None),
        r"annotation 2: it has no bbox",
    ),
    "file of another image": (
        lambda t: t["images"][1].update(file_name="./a.png"),
        r"image 3: another image has the same file, a\.png",
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
    assert invalid_labels.left_out.total() == 1
    of_picture = "image" in invalid_labels.found[0].split(": ")[1]
    assert (len(data), _objects(data)) == ((1, 3) if of_picture else (2, 2))


@pytest.mark.parametrize("name", ["../secret.png", "deep/../../secret.png", "/secret.png"])
def test_picture__outside_the_folder_is_not_read(
    write: Callable[..., str], tmp_path: Path, name: str
) -> None:
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "secret.png")
    uri = write(lambda tree: tree["images"][0].update(file_name=name))
    with pytest.raises(DataError, match="there is no picture"):
        _open(uri)


def test_file__that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no annotation file at .*none\.json"):
        _open(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Invalid JSON"),
        ('{"images": []}', "categories: Field required"),
        ('{"images": [], "categories": []}', "has no annotations: is this a test list"),
        (
            '{"images": [], "categories": [], "annotations": [{"image_id": 1, "category_id": 1}]}',
            "lists no images",
        ),
        (
            '{"images": [{"id": "img_1", "file_name": "a"}], "categories": []}',
            r"images\[0\]\.id: .* \('img_1'\)",
        ),
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


Spoil = Callable[[dict[str, Any]], object]


def _each(tree: dict[str, Any], kind: str, **values: Any) -> None:
    for record in tree[kind]:
        record.update(values)


def _without(*keys: str) -> Spoil:
    def spoil(tree: dict[str, Any]) -> None:
        for record in (*tree["images"], *tree["annotations"]):
            for key in keys:
                record.pop(key, None)

    return spoil


def _renamed(change: Callable[[str], str]) -> Spoil:
    def spoil(tree: dict[str, Any]) -> None:
        for record in tree["images"]:
            record["file_name"] = change(record["file_name"])

    return spoil


DIALECTS: dict[str, tuple[Spoil, dict[str, int]]] = {
    "./": (_renamed(lambda name: f"./{name}"), {}),
    "Windows' paths": (_renamed(lambda name: name.replace("/", "\\")), {}),
    "no sizes": (_without("height", "width"), {}),
    "sizes of 0": (lambda t: _each(t, "images", height=0, width=0), {}),
    "ids as whole floats": (lambda t: _each(t, "annotations", image_id=7.0), {}),
    "no ids, crowds and areas": (
        lambda t: (t["annotations"].pop(), _without("iscrowd", "area")(t)),
        {},
    ),
    "nulls": (lambda t: _each(t, "annotations", area=None, iscrowd=None), {}),
    "text ids of annotations": (lambda t: t["annotations"][0].update(id="a1"), {}),
    "one id for all": (
        lambda t: _each(t, "annotations", id=1),
        {"annotations whose id another one has, taken all the same": 2},
    ),
    "an annotation twice": (
        lambda t: t["annotations"].append(t["annotations"][0]),
        {"annotations that stand in the file twice, taken once": 1},
    ),
    "an image twice": (
        lambda t: t["images"].append(t["images"][0]),
        {"images that stand in the file twice": 1},
    ),
    "areas of 0": (
        lambda t: _each(t, "annotations", area=0),
        {"areas that are not positive, measured instead": 3},
    ),
    "a root category": (
        lambda t: (
            _each(t, "categories", supercategory="pets"),
            t["categories"].append({"id": 0, "name": "pets", "supercategory": "none"}),
        ),
        {"categories above others or named like another, without objects": 1},
    ),
    "a category without objects, named like another": (
        lambda t: t["categories"].insert(0, {"id": 0, "name": "cat"}),
        {"categories above others or named like another, without objects": 1},
    ),
    "a category twice": (
        lambda t: t["categories"].append(t["categories"][0]),
        {"categories that stand in the file twice": 1},
    ),
    "a polygon without a list around it": (
        lambda t: t["annotations"][2].update(segmentation=POLYGONS[0]),
        {},
    ),
    "a polygon of two points beside another": (
        lambda t: t["annotations"][2]["segmentation"].append([1, 2, 3, 4]),
        {"polygons of fewer than three points passed over": 1},
    ),
    "no box beside polygons": (
        lambda t: t["annotations"][2].pop("bbox"),
        {"objects without a box, which is taken from their polygons": 1},
    ),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialect__of_a_tool_says_the_same(write: Callable[..., str], dialect: str) -> None:
    spoil, told = DIALECTS[dialect]
    data, invalid_labels = _open(write(spoil))
    want = TREE["annotations"][: 2 if "no ids" in dialect else 3]
    assert len(data) == 2
    assert data.class_names == ("dog", "cat")
    boxes = data[0].boxes
    assert boxes[0].tolist() == [10, 5, 33, 20]
    assert (
        np.abs(boxes - [[x, y, x + w, y + h] for x, y, w, h in (t["bbox"] for t in want)]).max()
        <= 1
    )
    assert dict(invalid_labels.adapted) == told
    assert not invalid_labels.left_out
    assert invalid_labels.as_json()["adapted"] == told
    assert list(invalid_labels.notes()) == [f"{reason}: {count}" for reason, count in told.items()]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be-sig"])
def test_file__with_a_byte_order_mark_is_read(write: Callable[..., str], encoding: str) -> None:
    file = Path(write())
    text = "\ufeff" + file.read_text()
    file.write_bytes(
        text.encode({"utf-8-sig": "utf-8", "utf-16": "utf-16-le"}.get(encoding, "utf-16-be"))
    )
    assert len(_open(str(file))[0]) == 2


def test_file__of_another_encoding_is_named(write: Callable[..., str]) -> None:
    file = Path(write())
    file.write_bytes(file.read_bytes().replace(b"cat", b"k\xe4tzchen"))
    with pytest.raises(DataError, match=r"instances\.json is not UTF-8 text.*save it as UTF-8"):
        _open(str(file))


@pytest.mark.parametrize("empty", [{}, [], None, [[10, 10, 30, 10]], [[]]])
def test_mask__that_is_none_costs_no_box(write: Callable[..., str], empty: Any) -> None:
    uri = write(lambda tree: tree["annotations"][1].update(segmentation=empty))
    data, invalid_labels = _open(uri)
    assert _objects(data) == 3
    assert not data.has_masks
    assert invalid_labels.adapted.total() == (empty in ([[10, 10, 30, 10]], [[]]))
    with pytest.raises(DataError, match="annotation 2: it has no mask, which the task needs"):
        CocoDetection(uri, None, InvalidLabels(False), need_masks=True)
    left = InvalidLabels(True)
    masked = CocoDetection(uri, None, left, need_masks=True)
    assert masked.has_masks
    assert dict(left.left_out) == {"objects without a mask": 1}


def test_boxes__as_corners_are_refused_even_where_wrong_ones_are_left_out(
    write: Callable[..., str],
) -> None:
    def spoil(tree: dict[str, Any]) -> None:
        for thing in tree["annotations"]:
            left, top, width, height = thing["bbox"]
            thing["bbox"] = [left, top, left + width, top + height]

    with pytest.raises(DataError, match=r"boxes are \(left, top, right, bottom\)"):
        _open(write(spoil), skip=True)


def test_boxes__as_shares_are_refused(write: Callable[..., str]) -> None:
    with pytest.raises(DataError, match=r"within 0 and 1.* in pixels"):
        _open(write(lambda tree: _each(tree, "annotations", bbox=[0.1, 0.2, 0.3, 0.4])), skip=True)


def test_pictures__that_are_missing_are_counted(write: Callable[..., str]) -> None:
    def spoil(tree: dict[str, Any]) -> None:
        for number in range(50):
            image = {"id": 100 + number, "file_name": f"gone{number}.png"}
            tree["images"].append(image)

    with pytest.raises(DataError, match=r"no picture .*gone0\.png \(nor 49 more of 52\)"):
        _open(write(spoil))
    data, invalid_labels = _open(write(spoil), skip=True)
    assert len(data) == 2
    assert dict(invalid_labels.left_out) == {"pictures that are not there": 50}
    assert invalid_labels.notes()[0].startswith(
        "50 invalid labels left out (pictures that are not there: 50)"
    )


def test_picture__whose_name_listing_passes_over_is_found(
    write: Callable[..., str], tmp_path: Path
) -> None:
    uri = write(lambda tree: tree["images"][1].update(file_name="_camera/b.png"))
    (tmp_path / "images" / "deep").rename(tmp_path / "images" / "_camera")
    data, _ = _open(uri)
    assert data[1].image.size == (WIDTH, HEIGHT)


def _turn(path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (WIDTH, HEIGHT)).save(path, exif=exif)


def test_picture__that_exif_turns_is_told(write: Callable[..., str], tmp_path: Path) -> None:
    uri = write()
    _turn(tmp_path / "images" / "a.png", 6)
    with pytest.raises(DataError, match=r"40x60 pixels once EXIF has turned it, .*60x40 as stored"):
        _open(uri)
    _turn(tmp_path / "images" / "a.png", 3)  # upside down: the size does not tell
    data, invalid_labels = _open(uri)
    assert len(data) == 2
    assert dict(invalid_labels.adapted) == {TURNED: 1}


def _only(tree: dict[str, Any], *things: dict[str, Any]) -> None:
    tree["annotations"] = [
        _thing(number, segmentation=None) | thing for number, thing in enumerate(things, start=1)
    ]


def test_boxes__of_a_small_file_are_judged_one_by_one(write: Callable[..., str]) -> None:
    pixel = write(lambda tree: _only(tree, {"bbox": [0, 0, 1, 1]}))
    assert _open(pixel)[0][0].boxes.tolist() == [[0, 0, 1, 1]]
    slip = write(lambda tree: _only(tree, {"bbox": [4, 4, 8, 8]}, {"bbox": [5, 5, 57, 37]}))
    with pytest.raises(DataError, match=r"annotation 2: the box .* lies outside"):
        _open(slip)
    data, invalid_labels = _open(slip, skip=True)
    assert data[0].boxes.tolist() == [[4, 4, 12, 12]]
    assert invalid_labels.left_out.total() == 1
    square = [[4, 4, 12, 4, 12, 12, 4, 12]]  # agrees with its box as it stands
    mixed = ({"bbox": [4, 4, 8, 8], "segmentation": square}, *({"bbox": [5, 5, 57, 37]},) * 2)
    assert len(_open(write(lambda tree: _only(tree, *mixed)), skip=True)[0][0].boxes) == 1


@pytest.mark.parametrize(
    "mask",
    [[[200, 200, 260, 200, 260, 260]], _uncompressed(BLOB * 0), _compressed(BLOB * 0)],
    ids=["outside", "runs", "compressed"],
)
def test_masks__without_a_pixel_are_wrong_where_masks_are_needed(
    write: Callable[..., str], mask: Any
) -> None:
    uri = write(lambda tree: tree["annotations"][0].update(segmentation=mask, area=None))
    left = InvalidLabels(True)
    assert CocoDetection(uri, None, left, need_masks=True).has_masks
    assert dict(left.left_out) == {"masks without a pixel": 1}
    data, invalid_labels = _open(uri)
    assert invalid_labels.adapted.total() == 1
    assert data[0].areas[0] == 23 * 15  # of the box


def test_polygons__as_shares_are_refused(write: Callable[..., str]) -> None:
    shares = [[0.1, 0.1, 0.3, 0.1, 0.3, 0.3]]
    with pytest.raises(DataError, match=r"every polygon lies within 0 and 1.* in pixels"):
        _open(write(lambda tree: _each(tree, "annotations", segmentation=shares)), skip=True)


def test_mask__gives_the_box_that_is_missing(write: Callable[..., str]) -> None:
    for mask in (_uncompressed(BLOB), _compressed(BLOB)):
        uri = write(lambda tree, mask=mask: _only(tree, {"bbox": None, "segmentation": mask}))
        data, invalid_labels = _open(uri)
        assert data[0].boxes.tolist() == [[10, 5, 33, 20]]
        assert invalid_labels.adapted.total() == 1


def test_annotation__that_stands_twice_is_taken_once_whatever_lies_between(
    write: Callable[..., str],
) -> None:
    one, other = {"id": 5, "bbox": [2, 2, 4, 4]}, {"id": 5, "bbox": [2, 2, 5, 4]}
    data, _ = _open(write(lambda tree: _only(tree, one, other, one)))
    assert data[0].boxes.tolist() == [[2, 2, 6, 6], [2, 2, 7, 6]]
