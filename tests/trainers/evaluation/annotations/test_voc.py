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


def test_list__that_leads_out_of_the_folder_is_refused(
    write: Callable[..., str], tmp_path: Path
) -> None:
    uri = write()
    (tmp_path / "ImageSets/Main/train.txt").write_text("one\n../../secret\n")
    with pytest.raises(DataError, match=r"train\.txt names '\.\./\.\./secret', which leads out"):
        VocDetection(uri, "train", InvalidLabels(False))


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


def _rename(folder: Path, old: str, new: str) -> None:
    (folder / "JPEGImages" / f"{old}.jpg").rename(folder / "JPEGImages" / f"{new}.jpg")
    (folder / "Annotations" / f"{old}.xml").rename(folder / "Annotations" / f"{new}.xml")


def _list(folder: Path, content: bytes) -> tuple[list[str], InvalidLabels]:
    """Names of the pictures that a list takes, and what is counted of it."""
    (folder / "ImageSets" / "Main" / "train.txt").write_bytes(content)
    invalid_labels = InvalidLabels(False)
    data = VocDetection(str(folder), "train", invalid_labels)
    return [Path(data.name(index)).stem for index in range(len(data))], invalid_labels


@pytest.mark.parametrize(
    ("names", "content"),
    [
        (("GSH (2)", "GSH (5)"), "GSH (2)\nGSH (5)\n"),
        (("GSH (2)", "GSH (5)"), "GSH (2) -1\nGSH (5)  1\n"),
        (("a 1", "b 0"), "a 1\nb 0\n"),
        (("a 1", "b 0"), "a 1 1\nb 0 -1\n"),
        (("a.b.c", "d.rf.e"), "a.b.c\nd.rf.e.jpg\n"),
        (("one", "two"), "\ufeffone\r\n\r\ntwo\r\n\r\n"),
        (("one", "two"), "./one.jpg\n JPEGImages\\two.jpg \n"),
        (("one", "two"), "/home/me/VOC2012/JPEGImages/one.jpg\ntwo 1"),
    ],
)
def test_lists__as_tools_write_them(
    write: Callable[..., str], tmp_path: Path, names: tuple[str, str], content: str
) -> None:
    write()
    for old, new in zip(("one", "two"), names, strict=True):
        _rename(tmp_path, old, new)
    found, invalid_labels = _list(tmp_path, content.encode())
    assert found == list(names)
    assert invalid_labels.notes() == ()


def test_lists__a_flag_is_a_flag_where_both_readings_are_pictures(
    write: Callable[..., str], tmp_path: Path
) -> None:
    write()
    _rename(tmp_path, "two", "one 1")
    found, invalid_labels = _list(tmp_path, b"one 1\none  -1\n")
    assert found == ["one"]
    assert dict(invalid_labels.adapted) == {"lines that name a picture again": 1}


def test_lists__of_another_encoding_are_named(write: Callable[..., str], tmp_path: Path) -> None:
    write()
    with pytest.raises(DataError, match=r"train\.txt is not UTF-8 text"):
        _list(tmp_path, b"k\xe4tzchen\n")


@pytest.mark.parametrize("size", ["", "<size/>", "<size><width>0</width><height>0</height></size>"])
def test_size__is_the_pictures_own_where_none_is_stated(
    write: Callable[..., str], size: str
) -> None:
    content = f"<annotation>{size}{_object('cat', (1.5, 2, 60, 40))}</annotation>"
    data = VocDetection(write(content), "train", InvalidLabels(False))
    assert data[0].boxes.tolist() == [[0.5, 1, 60, 40]]


def test_filename__that_is_another_picture_is_counted(
    write: Callable[..., str], tmp_path: Path
) -> None:
    uri = write(
        _xml(_object("cat", (1, 1, 5, 5)), head="").replace(
            "<annotation>", "<annotation><filename>two.jpg</filename>"
        )
    )
    invalid_labels = InvalidLabels(False)
    data = VocDetection(uri, "train", invalid_labels)
    assert Path(data.name(0)).stem == "one"
    (note,) = invalid_labels.notes()
    assert note.startswith("annotation files whose <filename> is another picture")


def test_filename__finds_a_picture_of_another_name(
    write: Callable[..., str], tmp_path: Path
) -> None:
    uri = write(
        _xml(_object("cat", (1, 1, 5, 5))).replace(
            "<annotation>", "<annotation><filename>camera.jpg</filename>"
        )
    )
    (tmp_path / "JPEGImages" / "one.jpg").rename(tmp_path / "JPEGImages" / "camera.jpg")
    invalid_labels = InvalidLabels(False)
    data = VocDetection(uri, "train", invalid_labels)
    assert Path(data.name(0)).stem == "camera"
    assert invalid_labels.adapted.total() == 1


def test_pictures__of_one_name_are_refused(write: Callable[..., str], tmp_path: Path) -> None:
    uri = write()
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "JPEGImages" / "one.png")
    with pytest.raises(DataError, match=r"two pictures are one\.jpg and one\.png"):
        VocDetection(uri, "train", InvalidLabels(False))


def test_pictures__without_labels_are_counted_where_no_list_says_which(
    write: Callable[..., str], tmp_path: Path
) -> None:
    uri = write()
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "JPEGImages" / "three.jpg")
    invalid_labels = InvalidLabels(False)
    assert len(VocDetection(uri, None, invalid_labels)) == 2
    assert invalid_labels.notes() == ("pictures without an annotation file passed over: 1",)


def test_boxes__as_shares_are_refused(write: Callable[..., str], tmp_path: Path) -> None:
    uri = write(_xml(_object("cat", (0.1, 0.2, 0.5, 0.6))))
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("one\n")
    with pytest.raises(DataError, match=r"within 0 and 1.*pixels"):
        VocDetection(uri, "train", InvalidLabels(True))


def test_picture__that_exif_turns_is_told(write: Callable[..., str], tmp_path: Path) -> None:
    uri = write()
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "JPEGImages" / "one.jpg", exif=exif)
    with pytest.raises(DataError, match=r"one\.xml: .*40x60 pixels once EXIF has turned it"):
        VocDetection(uri, "train", InvalidLabels(False))


@pytest.mark.parametrize(("text", "difficult"), [("true", True), ("False", False), (" 1 ", True)])
def test_difficult__may_be_a_word(write: Callable[..., str], text: str, difficult: bool) -> None:
    uri = write(_xml(_object("cat", (1, 1, 5, 5)).replace(">0<", f">{text}<")))
    assert VocDetection(uri, "train", InvalidLabels(False))[0].crowd.tolist() == [difficult]


def test_difficult__of_another_word_is_refused(write: Callable[..., str]) -> None:
    uri = write(_xml(_object("cat", (1, 1, 5, 5)).replace(">0<", ">yes<")))
    with pytest.raises(DataError, match="object 1: <difficult> is 'yes', neither 0 nor 1"):
        VocDetection(uri, "train", InvalidLabels(False))


def test_box__of_the_first_pixel_is_no_share(write: Callable[..., str], tmp_path: Path) -> None:
    uri = write(_xml(_object("cat", (0, 0, 1, 1))))
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("one\n")
    assert VocDetection(uri, "train", InvalidLabels(False))[0].boxes.tolist() == [[0, 0, 1, 1]]
