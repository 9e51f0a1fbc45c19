"""Objects from a COCO detection file: boxes, and masks as polygons or run lengths."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field

import numpy as np
from pydantic import BaseModel, ValidationError

from mimray.trainers.data.files import is_file, join, locate, parent, read_bytes
from mimray.trainers.data.geometry import Size, clip_boxes
from mimray.trainers.errors import DataError, EmptyDatasetError
from mimray.trainers.evaluation.annotations.base import DetectionExample, InvalidLabels
from mimray.trainers.evaluation.annotations.pictures import PictureFolder, box_fault
from mimray.trainers.evaluation.score import Progress

# So many pictures are looked for to tell where all lie.
_PROBED = 8


class RunLengths(BaseModel):
    """A mask by the lengths of its runs of 0 and 1 in turn, down the columns.

    Attributes:
        size: (height, width).
        counts: the lengths, or COCO's compressed text of them.
    """

    size: tuple[int, int]
    counts: list[int] | str


class ImageRecord(BaseModel):
    """A picture in the file."""

    id: int
    file_name: str
    height: int
    width: int


class AnnotationRecord(BaseModel):
    """An object in the file; `bbox` is (left, top, width, height) in pixels."""

    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    segmentation: RunLengths | list[list[float]] | None = None
    area: float | None = None
    iscrowd: bool = False

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom), pixels."""
        left, top, width, height = self.bbox
        return left, top, left + width, top + height


class CategoryRecord(BaseModel):
    """A class in the file."""

    id: int
    name: str


class CocoFile(BaseModel):
    """The part of a COCO detection file that is read; it may hold more.

    Source: https://cocodataset.org/#format-data
    """

    images: list[ImageRecord]
    annotations: list[AnnotationRecord]
    categories: list[CategoryRecord]


@dataclass(frozen=True)
class _AnnotatedPicture:
    record: ImageRecord
    objects: list[AnnotationRecord] = field(default_factory=list)

    @property
    def size(self) -> Size:
        return self.record.height, self.record.width


class CocoDetection:
    """Pictures of a COCO detection file; they are read when asked for.

    Classes are the categories in the order of their ids. Everything but the pixels is checked
    here: ids, boxes, masks, and that each picture is there and of the size that the file says.

    Args:
        json_uri: URI of the file.
        images_uri: URI of the folder that `file_name` is relative to; None looks beside the file:
            in `images`, in a folder named like the file's split, in its own folder and above.
        invalid_labels: collects what is wrong, or refuses it; the object or the picture is left
            out.
        progress: called with the number of pictures checked.

    Raises:
        DataError: no such file, not COCO's layout, or a label that is wrong.
        EmptyDatasetError: no picture is left.
    """

    def __init__(
        self,
        json_uri: str,
        images_uri: str | None,
        invalid_labels: InvalidLabels,
        progress: Progress | None = None,
    ) -> None:
        content = read_coco(json_uri)
        tree = parse_coco(json_uri, content)
        self.uri = json_uri
        self._folder = PictureFolder.open(images_uri or images_of(json_uri, tree.images))
        categories = sorted(tree.categories, key=lambda record: record.id)
        self.class_names = tuple(record.name for record in categories)
        self._classes = {record.id: label for label, record in enumerate(categories)}
        if len(self._classes) < len(categories) or len({*self.class_names}) < len(categories):
            raise DataError(
                f"{json_uri}: two categories share an id or a name", hint="give each its own"
            )
        self._pictures = self._take_pictures(tree.images, invalid_labels, progress)
        self._take_objects(tree, invalid_labels)
        objects = [thing for picture in self._pictures for thing in picture.objects]
        self.has_masks = bool(objects) and all(thing.segmentation for thing in objects)
        digest = hashlib.sha256(content)
        for picture in self._pictures:
            path = picture.record.file_name
            digest.update(json.dumps([path, self._folder.num_bytes[path]]).encode())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> DetectionExample:
        picture = self._pictures[index]
        objects, (height, width) = picture.objects, picture.size
        boxes = np.array([thing.box for thing in objects], np.float64).reshape(-1, 4)
        boxes = clip_boxes(boxes, (0.0, 0.0, float(width), float(height)))
        measured = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        masks = None
        if self.has_masks:
            masks = np.zeros((len(objects), height, width), bool)
            for number, thing in enumerate(objects):
                assert thing.segmentation is not None
                masks[number] = decode_mask(thing.segmentation, picture.size)
            measured = masks.sum(axis=(1, 2)).astype(np.float64)
        for number, thing in enumerate(objects):
            measured[number] = measured[number] if thing.area is None else thing.area
        return DetectionExample(
            image=self._folder.read(picture.record.file_name),
            image_id=picture.record.id,
            boxes=boxes,
            labels=np.array([self._classes[thing.category_id] for thing in objects], np.int64),
            crowd=np.array([thing.iscrowd for thing in objects], bool),
            areas=measured,
            masks=masks,
        )

    def labels(self, index: int) -> np.ndarray:
        """Classes of a picture's objects without its crowds, int64."""
        objects = self._pictures[index].objects
        return np.array([self._classes[o.category_id] for o in objects if not o.iscrowd], np.int64)

    def name(self, index: int) -> str:
        """Path of a picture."""
        return self._folder.name(self._pictures[index].record.file_name)

    def _take_pictures(
        self, records: list[ImageRecord], invalid_labels: InvalidLabels, progress: Progress | None
    ) -> list[_AnnotatedPicture]:
        """The pictures that exist and have the size that the file says."""
        taken = []
        seen: set[int] = set()
        for number, record in enumerate(records):
            fault = (
                "another image has the same id"
                if record.id in seen
                else self._folder.fault(record.file_name, (record.height, record.width))
            )
            seen.add(record.id)
            if fault:
                invalid_labels.add(f"{self.uri}: image {record.id}", fault)
            else:
                taken.append(_AnnotatedPicture(record))
            if progress is not None:
                progress("checking pictures", number + 1, len(records))
        if not taken:
            raise EmptyDatasetError(
                f"{self.uri} holds no picture that can be used",
                hint=f"pictures were looked for in {self._folder.uri}",
            )
        return taken

    def _take_objects(self, tree: CocoFile, invalid_labels: InvalidLabels) -> None:
        """Put each object into its picture; objects of pictures left out are dropped."""
        taken = {picture.record.id: picture for picture in self._pictures}
        listed = {record.id: (record.height, record.width) for record in tree.images}
        seen: set[int] = set()
        for record in tree.annotations:
            fault = (
                "another annotation has the same id"
                if record.id in seen
                else f"there is no image {record.image_id}"
                if record.image_id not in listed
                else f"there is no category {record.category_id}"
                if record.category_id not in self._classes
                else box_fault(record.box, listed[record.image_id])
                or _mask_fault(record.segmentation, listed[record.image_id])
            )
            seen.add(record.id)
            if fault:
                invalid_labels.add(f"{self.uri}: annotation {record.id}", fault)
            elif record.image_id in taken:
                taken[record.image_id].objects.append(record)


def images_of(json_uri: str, records: list[ImageRecord]) -> str:
    """The folder that the pictures of a file lie in."""
    folder, stem = parent(json_uri), json_uri.rpartition("/")[2].partition(".")[0]
    split = stem.removeprefix("instances_").removeprefix("panoptic_")
    below, above = ("images", split, f"images/{split}"), (f"images/{split}", split, "images")
    places = [*(join(folder, name) for name in below), folder]
    places += [join(parent(folder), name) for name in above]
    for place in places:
        # A few, since the first picture may be what is missing.
        if any(is_file(join(place, record.file_name)) for record in records[:_PROBED]):
            return place
    looked = ", ".join(places)
    raise DataError(
        f"{json_uri}: none of its pictures is where it should be", hint=f"looked in {looked}"
    )


def read_coco(uri: str) -> bytes:
    """Read the bytes of an annotation file.

    Raises:
        DataError: there is none.
    """
    if not is_file(uri):
        raise DataError(f"no annotation file at {uri}", hint="check the path")
    return read_bytes(*locate(uri))


def parse_coco(uri: str, content: bytes) -> CocoFile:
    """Parse a COCO detection file.

    Args:
        uri: URI of the file, for messages.
        content: bytes of the file.

    Raises:
        DataError: it is not JSON, or not COCO's layout.
    """
    try:
        return CocoFile.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"])
        raise DataError(
            f"{uri}: {(place.lstrip('.') + ': ') if place else ''}{first['msg']}",
            hint="COCO detection has images, annotations and categories",
        ) from None


def decode_mask(segmentation: RunLengths | list[list[float]], size: Size) -> np.ndarray:
    """Pixels of an object, bool [h, w].

    Args:
        segmentation: polygons (x, y, x, y, …) or run lengths.
        size: (height, width) of the picture.

    Source: https://github.com/cocodataset/cocoapi (maskApi.c), by faster-coco-eval.
    """
    from faster_coco_eval.core import mask as mask_api

    plain = segmentation.model_dump() if isinstance(segmentation, RunLengths) else segmentation
    decoded = mask_api.decode(mask_api.segmToRle(plain, size[1], size[0]))
    return np.asarray(decoded).reshape(size).astype(bool)


def _mask_fault(segmentation: RunLengths | list[list[float]] | None, size: Size) -> str | None:
    """The fault of a mask for a picture of (height, width); None where there is none."""
    if not segmentation:
        return None
    if isinstance(segmentation, RunLengths):
        height, width = segmentation.size
        if segmentation.size != size:
            return f"its mask is {width}x{height}, the picture {size[1]}x{size[0]} pixels"
        if isinstance(segmentation.counts, list) and sum(segmentation.counts) != height * width:
            return f"its mask's runs come to {sum(segmentation.counts)} of {height * width} pixels"
        return None
    if any(len(polygon) < 6 or len(polygon) % 2 for polygon in segmentation):
        return "a polygon of its mask is not three or more (x, y)"
    return None
