"""Objects from a Pascal VOC folder: one XML file a picture."""

from __future__ import annotations

import hashlib
import posixpath
from collections import defaultdict
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np

from mimray.trainers.data.files import (
    is_inside,
    is_picture,
    join,
    list_files,
    locate,
    read_bytes,
)
from mimray.trainers.data.geometry import Size, clip_boxes
from mimray.trainers.errors import DataError, EmptyDatasetError
from mimray.trainers.evaluation.annotations.base import DetectionExample, Fault, InvalidLabels
from mimray.trainers.evaluation.annotations.pictures import (
    PictureFolder,
    are_shares,
    box_fault,
    read_lines,
)
from mimray.trainers.evaluation.score import Progress

PICTURES = "JPEGImages"
ANNOTATIONS = "Annotations"
SPLITS = "ImageSets/Main"

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
# Behind a name in a list: the class is absent, hard to see, present.
_FLAGS = ("-1", "0", "1")
_DIFFICULT = {"0": False, "1": True, "false": False, "true": True}
_NO_XML = "annotation files that cannot be read"


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
    Objects marked `difficult` count as crowds. Classes are the names, sorted. An XML file without a
    size takes its picture's own.

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
        self._paths_of: dict[str, list[str]] = defaultdict(list)
        for path in self._folder.num_bytes:
            self._paths_of[path.rpartition(".")[0]].append(path)
        self._pictures: list[_AnnotatedPicture] = []
        stems = self._stems(split, invalid_labels)
        digest = hashlib.sha256()
        for number, stem in enumerate(stems):
            picture = self._take(stem, invalid_labels, digest)
            if picture is not None:
                self._pictures.append(picture)
            if progress is not None:
                progress("checking pictures", number + 1, len(stems))
        self._refuse_shares()
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

    def _stems(self, split: str | None, invalid_labels: InvalidLabels) -> list[str]:
        """Names of a split's pictures, without suffix."""
        if split is None:
            files = list_files(join(self.uri, ANNOTATIONS))
            stems = [f.path.removesuffix(".xml") for f in files if f.path.endswith(".xml")]
            unlabelled = len(set(self._paths_of) - set(stems))
            invalid_labels.adapt("pictures without an annotation file passed over", unlabelled)
            return stems
        place = join(self.uri, f"{SPLITS}/{split}.txt")
        try:
            lines = read_lines(place)
        except FileNotFoundError:
            raise DataError(f"there is no {place}", hint=f"{SPLITS} holds the lists") from None
        listed = [self._stem(line) for line in lines if line]
        for stem in listed:
            if not is_inside(stem):
                raise DataError(f"{place} names {stem!r}, which leads out of {self.uri}")
        stems = list(dict.fromkeys(listed))
        invalid_labels.adapt("lines that name a picture again", len(listed) - len(stems))
        return stems

    def _stem(self, line: str) -> str:
        """The name, without suffix, that a line of a list means.

        VOC's lists may put a flag behind a name: -1, 0 or 1. Names may hold spaces.
        """
        name, _, flag = line.rpartition(" ")
        unflagged = _plain_stem(name.strip()) if flag in _FLAGS else ""
        whole = _plain_stem(line)
        known = unflagged in self._paths_of or whole not in self._paths_of
        return unflagged if unflagged and known else whole

    def _picture_of(
        self, stem: str, root: ElementTree.Element, invalid_labels: InvalidLabels
    ) -> str:
        """Path of the picture that an XML file is for: of its own name, or the one it states."""
        paths = self._paths_of.get(stem, [])
        if len(paths) > 1:
            raise _XmlError("pictures of one name", f"two pictures are {' and '.join(paths)}")
        stated = (root.findtext("filename") or "").strip()
        named = self._folder.find(stated) if stated else None
        if paths:
            differs = named is not None and named != paths[0]
            invalid_labels.adapt(
                "annotation files whose <filename> is another picture, taken by their own name",
                int(differs),
            )
            return paths[0]
        if named is not None:
            invalid_labels.adapt("annotation files whose picture is found by <filename>")
            return named
        missing = f"there is no picture {self._folder.name(stem)}.*"
        raise _XmlError("pictures that are not there", missing)

    def _take(
        self, stem: str, invalid_labels: InvalidLabels, digest: hashlib._Hash
    ) -> _AnnotatedPicture | None:
        """A picture with its objects; None where it is left out."""
        place = join(self.uri, f"{ANNOTATIONS}/{stem}.xml")
        try:
            content = read_bytes(*locate(place))
        except FileNotFoundError:
            paths = self._paths_of.get(stem)
            missing = Fault(
                "pictures without an annotation file", f"has no annotation file {place}"
            )
            if not paths:
                missing = Fault(
                    "pictures that are not there",
                    f"there is neither a picture {self._folder.name(stem)}.* nor {place}",
                )
            invalid_labels.add(self._folder.name(paths[0] if paths else stem), missing)
            return None
        try:
            root = _parse(content)
            path = self._picture_of(stem, root, invalid_labels)
            size = self._folder.checked_size(path, _stated_size(root), invalid_labels)
            if isinstance(size, Fault):
                raise _XmlError(*size)
        except _XmlError as error:
            invalid_labels.add(place, error.fault)
            return None
        objects = []
        for number, record in enumerate(root.findall("object")):
            where = f"{place}: object {number + 1}"
            try:
                thing = _object(record)
            except _XmlError as error:
                invalid_labels.add(where, error.fault)
                continue
            fault = _corner_fault(thing) or box_fault(thing.box, size)
            if fault:
                invalid_labels.add(f"{where} ({thing.name})", fault)
            else:
                objects.append(thing)
        digest.update(content + f"{path} {self._folder.num_bytes[path]}".encode())
        return _AnnotatedPicture(path, size, objects)

    def _refuse_shares(self) -> None:
        """Refuse boxes that are shares of their picture; corners count pixels, from 0 or 1."""
        corners = [thing.corners for picture in self._pictures for thing in picture.objects]
        if are_shares(corners):
            raise DataError(
                f"{self.uri}: every box lies within 0 and 1, as shares of the picture do",
                hint="xmin, ymin, xmax and ymax are pixels",
            )


class _XmlError(Exception):
    """A fault of a file or of an element of it."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.fault = Fault(reason, text)


def _plain_stem(name: str) -> str:
    """A name of a list without the folder of pictures, `./` and the suffix."""
    path = posixpath.normpath(name.replace("\\", "/")) if name else ""
    path = path.rpartition(f"{PICTURES}/")[2]
    return path.rpartition(".")[0] if is_picture(path) else path


def _parse(content: bytes) -> ElementTree.Element:
    """The tree of a file."""
    _refuse_entities(content)
    try:
        return ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise _XmlError(_NO_XML, f"is not XML: {error}") from None


def _stated_size(root: ElementTree.Element) -> Size | None:
    """(height, width) that a file speaks of; None where it does not, or says 0."""
    if not (root.findtext("size/height") or root.findtext("size/width")):
        return None
    height, width = (int(_number(root, f"size/{side}")) for side in ("height", "width"))
    return (height, width) if height and width else None


def _object(record: ElementTree.Element) -> _Object:
    left, top, right, bottom = (_number(record, f"bndbox/{corner}") for corner in _CORNERS)
    name = (record.findtext("name") or "").strip()
    if not name:
        raise _XmlError("objects without a name", "has no name")
    return _Object(name, _is_difficult(record), (left, top, right, bottom))


def _is_difficult(record: ElementTree.Element) -> bool:
    text = (record.findtext("difficult") or "0").strip().lower()
    if text not in _DIFFICULT:
        raise _XmlError(
            "marks that are neither 0 nor 1", f"<difficult> is {text!r}, neither 0 nor 1"
        )
    return _DIFFICULT[text]


def _corner_fault(thing: _Object) -> Fault | None:
    left, top, right, bottom = thing.corners
    if left < right and top < bottom:
        return None
    shown = ", ".join(f"{name} {v:g}" for name, v in zip(_CORNERS, thing.corners, strict=True))
    return Fault("boxes without area", f"the box has no area: {shown}")


def _number(element: ElementTree.Element, path: str) -> float:
    text = element.findtext(path)
    try:
        return float(text or "")
    except ValueError:
        raise _XmlError(
            "values that are no numbers", f"<{path}> is {text!r}, not a number"
        ) from None


def _refuse_entities(content: bytes) -> None:
    """Refuse entities: those that name each other grow without bound, and labels need none."""
    parser = expat.ParserCreate()

    def refuse(*_: object) -> None:
        raise _XmlError(_NO_XML, "declares entities, which labels have no use for")

    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(content, True)
    except expat.ExpatError as error:
        raise _XmlError(_NO_XML, f"is not XML: {error}") from None
