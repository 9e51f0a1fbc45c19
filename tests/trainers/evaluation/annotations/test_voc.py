from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mimray.trainers.errors import DataError, EmptyDatasetError
from mimray.trainers.evaluation.annotations.base import InvalidLabels
from mimray.trainers.evaluation.annotations.voc import VocDetection

HEIGHT, WIDTH = 40, 60


def _object(name: str, corners: tuple[float, ...], difficult: int | None = 0) -> str:
    tags = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    box = "".join(f"<{tag}>{value}</{tag}>" for tag, value in tags)
    mark = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    return f"<object><name>{name}</name>{mark}<bndbox>{box}</bndbox></object>"


def _xml(*objects: str, width: int = WIDTH, head: str = "") -> str:
    size = f"<size><width>{width}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    return f"{head}<annotation>{size}{''.join(objects)}</annotation>"


FIRST = _xml(
    _object("dog", (1, 1, 60, 40)), _object("cat", (11, 6, 20, 25)), _object("cat", (2, 2, 9, 9), 1)
)
SECOND = _xml(_object("ant", (0, 5, 7.5, 12), None))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def writes(first: str = FIRST) -> str:
        for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, content in (("one", first), ("two", SECOND)):
            Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "JPEGImages" / f"{name}.jpg")
            (tmp_path / "Annotations" / f"{name}.xml").write_text(content)
        (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("one\ntwo  1\n\n")
        (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("two.jpg\n")
        return str(tmp_path)

    return writes


def test_reader__turns_inclusive_pixels_into_edges(write: Callable[..., str]) -> None:
    data = VocDetection(write(), "train", InvalidLabels(False))
    assert len(data) == 2
    assert data.class_names == ("ant", "cat", "dog")
    example = data[0]
    # The whole picture is (1, 1, W, H) in VOC and (0, 0, W, H) here.
    assert example.boxes.tolist() == [[0, 0, 60, 40], [10, 5, 20, 25], [1, 1, 9, 9]]
    assert example.areas.tolist() == [2400, 200, 64]
    assert example.labels.tolist() == [2, 1, 1]
    assert example.crowd.tolist() == [False, False, True]  # difficult
    assert data.labels(0).tolist() == [2, 1]
    assert example.masks is None
    # Written by a tool that counts from 0: cut at the edge.
    assert data[1].boxes.tolist() == [[0, 4, 7.5, 12]]


def test_splits__are_the_lists(write: Callable[..., str]) -> None:
    uri = write()
    assert len(VocDetection(uri, "val", InvalidLabels(False))) == 1
    assert len(VocDetection(uri, None, InvalidLabels(False))) == 2
    with pytest.raises(DataError, match=r"there is no .*dev\.txt"):
        VocDetection(uri, "dev", InvalidLabels(False))


BOMB = '<!DOCTYPE a [<!ENTITY x "xx"><!ENTITY y "&x;&x;">]>'
FAULTS = {
    "no area": (_xml(_object("cat", (5, 6, 5, 9))), r"object 1 \(cat\): the box has no area"),
    "outside": (
        _xml(_object("cat", (1, 1, 5, 5)), _object("dog", (50, 6, 70, 9))),
        r"object 2 \(dog\): the box .* outside the picture of 60x40",
    ),
    "no number": (_xml(_object("cat", ("x", 6, 5, 9))), r"object 1: <bndbox/xmin> is 'x'"),
    "no name": (_xml(_object("", (1, 6, 5, 9))), "object 1: has no name"),
    "another size": (_xml(width=61), "has 60x40 pixels, its labels are for 61x40"),
    "no xml": ("<annotation>", "is not XML"),
    "entities": (_xml(head=BOMB), "declares entities"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault__names_file_and_object(write: Callable[..., str], fault: str) -> None:
    content, message = FAULTS[fault]
    uri = write(content)
    with pytest.raises(DataError, match=rf"one\.xml.*{message}"):
        VocDetection(uri, "train", InvalidLabels(False))
    invalid_labels = InvalidLabels(True)
    data = VocDetection(uri, "train", invalid_labels)
    assert len(invalid_labels.found) == 1
    assert len(data) == (2 if "object" in message else 1)


def test_missing_files__are_named(write: Callable[..., str], tmp_path: Path) -> None:
    uri = write()
    (tmp_path / "Annotations" / "one.xml").unlink()
    with pytest.raises(DataError, match=r"one\.jpg: has no annotation file .*one\.xml"):
        VocDetection(uri, "train", InvalidLabels(False))
    write()
    (tmp_path / "JPEGImages" / "one.jpg").unlink()
    with pytest.raises(DataError, match=r"one\.xml: there is no picture"):
        VocDetection(uri, "train", InvalidLabels(False))


def test_no_picture_left__is_an_error(write: Callable[..., str], tmp_path: Path) -> None:
    uri = write()
    (tmp_path / "ImageSets" / "Main" / "test.txt").write_text("\n")
    with pytest.raises(EmptyDatasetError, match="no picture of test can be used"):
        VocDetection(uri, "test", InvalidLabels(False))


def test_fingerprint__changes_with_labels(write: Callable[..., str]) -> None:
    first = VocDetection(write(), "train", InvalidLabels(False)).fingerprint
    other = VocDetection(write(SECOND), "train", InvalidLabels(False)).fingerprint
    assert VocDetection(write(), "train", InvalidLabels(False)).fingerprint == first
    assert other != first
