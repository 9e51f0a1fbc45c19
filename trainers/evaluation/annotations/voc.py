"""Objects from a Pascal VOC folder: one XML file a picture."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np

from mimray.trainers.data.files import is_picture, join, list_files, locate, read_bytes
from mimray.trainers.data.geometry import Size, clip_boxes
from mimray.trainers.errors import DataError, EmptyDatasetError
from mimray.trainers.evaluation.annotations.base import DetectionExample, InvalidLabels
from mimray.trainers.evaluation.annotations.pictures import PictureFolder, box_fault
from mimray.trainers.evaluation.score import Progress

PICTURES = "JPEGImages"
ANNOTATIONS = "Annotations"
SPLITS = "ImageSets/Main"

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class _Object:
    name: str
    difficult: bool
    corners: tuple[float, float, float, float]  # as in the file

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom), continuous."""
        left, top, right, bottom = self.corners
        return left - 1, top - 1, right, bottom


@dataclass(frozen=True)
class _AnnotatedPicture:
    path: str
    size: Size
    objects: list[_Object]


class VocDetection:
    """Pictures of one split of a Pascal VOC folder; they are read when asked for.

    VOC counts pixels from 1 and means its corners to be included, so a box covers
    (xmin - 1, ymin - 1, xmax, ymax). Tools that count from 0 are not told apart: their boxes
    begin a pixel early, and are cut at the picture's edge. `xmin` = `xmax` is refused all the
    same: from the tools in use today that is a slip of the mouse and not a single pixel.
    Objects marked `difficult` count as crowds. Classes are the names, sorted.

    Args:
        uri: URI of the folder that holds `JPEGImages` and `Annotations`.
        split: name of a list in `ImageSets/Main`; None takes every picture that has an XML file.
        invalid_labels: collects what is wrong, or refuses it; the object or the picture is left
            out.
        progress: called with the number of pictures checked.

    Raises:
        DataError: no such list, or a label that is wrong.
        EmptyDatasetError: no picture is left.

    Source: Everingham et al. 2012, "The PASCAL VOC 2012 development kit", sec. 11.
    """

    has_masks = False

    def __init__(
        self,
        uri: str,
        split: str | None,
        invalid_labels: InvalidLabels,
        progress: Progress | None = None,
    ) -> None:
        self.uri = uri
        self._folder = PictureFolder.open(join(uri, PICTURES))
        self._by_stem = {path.rpartition(".")[0]: path for path in self._folder.num_bytes}
        self._pictures: list[_AnnotatedPicture] = []
        stems = _stems(uri, split)
        digest = hashlib.sha256()
        for number, stem in enumerate(stems):
            picture = self._take(stem, invalid_labels, digest)
            if picture is not None:
                self._pictures.append(picture)
            if progress is not None:
                progress("checking pictures", number + 1, len(stems))
        if not self._pictures:
            raise EmptyDatasetError(f"{uri}: no picture of {split or 'it'} can be used")
        self.fingerprint = digest.hexdigest()
        names = {thing.name for picture in self._pictures for thing in picture.objects}
        self.class_names = tuple(sorted(names))
        self._classes = {name: label for label, name in enumerate(self.class_names)}

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> DetectionExample:
        picture = self._pictures[index]
        boxes = np.array([thing.box for thing in picture.objects], np.float64).reshape(-1, 4)
        height, width = picture.size
        boxes = clip_boxes(boxes, (0.0, 0.0, float(width), float(height)))
        return DetectionExample(
            image=self._folder.read(picture.path),
            image_id=index,
            boxes=boxes,
            labels=np.array([self._classes[thing.name] for thing in picture.objects], np.int64),
            crowd=np.array([thing.difficult for thing in picture.objects], bool),
            areas=(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
            masks=None,
        )

    def labels(self, index: int) -> np.ndarray:
        """Classes of a picture's objects without the difficult ones, int64."""
        objects = self._pictures[index].objects
        return np.array([self._classes[o.name] for o in objects if not o.difficult], np.int64)

    def name(self, index: int) -> str:
        """Path of a picture."""
        return self._folder.name(self._pictures[index].path)

    def _take(
        self, stem: str, invalid_labels: InvalidLabels, digest: hashlib._Hash
    ) -> _AnnotatedPicture | None:
        """A picture with its objects; None where it is left out."""
        place = join(self.uri, f"{ANNOTATIONS}/{stem}.xml")
        path = self._by_stem.get(stem)
        if path is None:
            invalid_labels.add(place, f"there is no picture {self._folder.name(stem)}.*")
            return None
        try:
            content = read_bytes(*locate(place))
        except FileNotFoundError:
            invalid_labels.add(self._folder.name(path), f"has no annotation file {place}")
            return None
        try:
            size, records = _parse(content)
        except _XmlError as error:
            invalid_labels.add(place, str(error))
            return None
        fault = self._folder.fault(path, size)
        if fault:
            invalid_labels.add(place, fault)
            return None
        objects = []
        for number, record in enumerate(records):
            where = f"{place}: object {number + 1}"
            try:
                thing = _object(record)
            except _XmlError as error:
                invalid_labels.add(where, str(error))
                continue
            fault = _corner_fault(thing) or box_fault(thing.box, size)
            if fault:
                invalid_labels.add(f"{where} ({thing.name})", fault)
            else:
                objects.append(thing)
        digest.update(content + f"{path} {self._folder.num_bytes[path]}".encode())
        return _AnnotatedPicture(path, size, objects)


class _XmlError(Exception):
    """A fault of a file or of an element of it."""


def _stems(uri: str, split: str | None) -> list[str]:
    """Names of a split's pictures, without suffix."""
    if split is None:
        files = list_files(join(uri, ANNOTATIONS))
        return [file.path.removesuffix(".xml") for file in files if file.path.endswith(".xml")]
    place = join(uri, f"{SPLITS}/{split}.txt")
    try:
        lines = read_bytes(*locate(place)).decode().splitlines()
    except FileNotFoundError:
        raise DataError(f"there is no {place}", hint=f"{SPLITS} holds the lists") from None
    names = [line.split()[0] for line in lines if line.strip()]
    return [name.rpartition(".")[0] if is_picture(name) else name for name in names]


def _parse(content: bytes) -> tuple[Size, list[ElementTree.Element]]:
    """(height, width) that a file speaks of, and its objects."""
    _refuse_entities(content)
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise _XmlError(f"is not XML: {error}") from None
    height, width = (_number(root, f"size/{side}") for side in ("height", "width"))
    return (int(height), int(width)), root.findall("object")


def _object(record: ElementTree.Element) -> _Object:
    left, top, right, bottom = (_number(record, f"bndbox/{corner}") for corner in _CORNERS)
    name = (record.findtext("name") or "").strip()
    if not name:
        raise _XmlError("has no name")
    difficult = (record.findtext("difficult") or "0").strip() == "1"
    return _Object(name, difficult, (left, top, right, bottom))


def _corner_fault(thing: _Object) -> str | None:
    left, top, right, bottom = thing.corners
    if left < right and top < bottom:
        return None
    shown = ", ".join(f"{name} {v:g}" for name, v in zip(_CORNERS, thing.corners, strict=True))
    return f"the box has no area: {shown}"


def _number(element: ElementTree.Element, path: str) -> float:
    text = element.findtext(path)
    try:
        return float(text or "")
    except ValueError:
        raise _XmlError(f"<{path}> is {text!r}, not a number") from None


def _refuse_entities(content: bytes) -> None:
    """Refuse entities: those that name each other grow without bound, and labels need none."""
    parser = expat.ParserCreate()

    def refuse(*_: object) -> None:
        raise _XmlError("declares entities, which labels have no use for")

    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(content, True)
    except expat.ExpatError as error:
        raise _XmlError(f"is not XML: {error}") from None
