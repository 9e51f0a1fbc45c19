"""Objects from a COCO detection file: boxes, and masks as polygons or run lengths."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mimray.trainers.data.geometry import Size, clip_boxes
from mimray.trainers.errors import DataError, EmptyDatasetError
from mimray.trainers.evaluation.annotations.base import DetectionExample, Fault, InvalidLabels
from mimray.trainers.evaluation.annotations.coco_file import (
    DETECTION_LAYOUT,
    AnnotationRecord,
    CocoFile,
    ImageRecord,
    RunLengths,
    images_of,
    parse_coco,
    read_coco,
    take_categories,
)
from mimray.trainers.evaluation.annotations.pictures import (
    EDGE_PX,
    PictureFolder,
    are_shares,
    box_fault,
)
from mimray.trainers.evaluation.score import Progress

# A box and the polygons that it is drawn around differ by no more, per side.
_AGREE_PX = 2.0
_EMPTY = "masks without a pixel"


@dataclass(frozen=True)
class _AnnotatedPicture:
    record: ImageRecord
    path: str
    size: Size
    objects: list[AnnotationRecord] = field(default_factory=list)


class CocoDetection:
    """Pictures of a COCO detection file; they are read when asked for.

    Classes are the categories in the order of their ids. Everything but the pixels is checked
    here: ids, boxes, masks, and that each picture is there and of the size that the file says.
    Ids of annotations name objects in messages only.

    Args:
        json_uri: URI of the file.
        images_uri: URI of the folder that `file_name` is relative to; None looks beside the file:
            in `images`, in a folder named like the file's split, in its own folder and above.
        invalid_labels: collects what is wrong, or refuses it; the object or the picture is left
            out.
        progress: called with the number of pictures checked.
        need_masks: True if an object without a mask is wrong where others have one.

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
        *,
        need_masks: bool = False,
    ) -> None:
        content = read_coco(json_uri)
        tree = parse_coco(json_uri, content, CocoFile, DETECTION_LAYOUT)
        if not tree.annotations:
            raise DataError(
                f"{json_uri} has no annotations: is this a test list?",
                hint="labelled pictures are needed; --val names others to score on",
            )
        self.uri = json_uri
        self._folder = PictureFolder.open(images_uri or images_of(json_uri, tree.images))
        used = {record.category_id for record in tree.annotations}
        categories = take_categories(json_uri, tree.categories, used, invalid_labels)
        self.class_names = tuple(record.name for record in categories)
        self._classes = {record.id: label for label, record in enumerate(categories)}
        self._pictures = self._take_pictures(tree.images, invalid_labels, progress)
        self._take_objects(tree, invalid_labels, need_masks)
        objects = [thing for picture in self._pictures for thing in picture.objects]
        self.has_masks = bool(objects) and all(thing.segmentation for thing in objects)
        digest = hashlib.sha256(content.encode())
        for picture in self._pictures:
            record = [picture.record.file_name, self._folder.num_bytes[picture.path]]
            digest.update(json.dumps(record).encode())
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
            pixels = masks.sum(axis=(1, 2)).astype(np.float64)
            measured = np.where(pixels > 0, pixels, measured)
        for number, thing in enumerate(objects):
            measured[number] = thing.area or measured[number]
        return DetectionExample(
            image=self._folder.read(picture.path),
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
        return self._folder.name(self._pictures[index].path)

    def _take_pictures(
        self, records: list[ImageRecord], invalid_labels: InvalidLabels, progress: Progress | None
    ) -> list[_AnnotatedPicture]:
        """The pictures that exist and have the size that the file says."""
        distinct = list({record.model_dump_json(): record for record in records}.values())
        invalid_labels.adapt("images that stand in the file twice", len(records) - len(distinct))
        records = distinct
        paths = [self._folder.find(record.file_name) for record in records]
        more = paths.count(None) - 1
        also = f" (nor {more} more of {len(paths)})" if more > 0 and not invalid_labels.skip else ""
        taken: list[_AnnotatedPicture] = []
        ids: set[int] = set()
        seen: set[str] = set()
        for number, (record, path) in enumerate(zip(records, paths, strict=True)):
            size: Size | Fault
            if record.id in ids:
                size = Fault("images of an id twice", "another image has the same id")
            elif path is None:
                missing = f"there is no picture {self._folder.name(record.file_name)}{also}"
                size = Fault("pictures that are not there", missing)
            elif path in seen:
                size = Fault("images of a file twice", f"another image has the same file, {path}")
            else:
                size = self._folder.checked_size(path, record.stated_size, invalid_labels)
            ids.add(record.id)
            if isinstance(size, Fault):
                invalid_labels.add(f"{self.uri}: image {record.id}", size)
            else:
                assert path is not None
                seen.add(path)
                taken.append(_AnnotatedPicture(record, path, size))
            if progress is not None:
                progress("checking pictures", number + 1, len(records))
        if not taken:
            raise EmptyDatasetError(
                f"{self.uri} holds no picture that can be used",
                hint=f"pictures were looked for in {self._folder.uri}",
            )
        return taken

    def _take_objects(
        self, tree: CocoFile, invalid_labels: InvalidLabels, need_masks: bool
    ) -> None:
        """Put each object into its picture; objects of pictures left out are dropped."""
        taken = {picture.record.id: picture for picture in self._pictures}
        listed = {record.id for record in tree.images}
        records = [_adapted(record, invalid_labels) for record in tree.annotations]
        self._refuse_other_boxes(
            [
                (record, taken[record.image_id].size)
                for record in records
                if record.image_id in taken
            ]
        )
        need_masks = need_masks and any(record.segmentation for record in records)
        seen: dict[int | str, list[AnnotationRecord]] = {}
        for number, record in enumerate(records):
            if record.id is not None and record.id in seen:
                if record in seen[record.id]:
                    invalid_labels.adapt("annotations that stand in the file twice, taken once")
                    continue
                invalid_labels.adapt("annotations whose id another one has, taken all the same")
            fault: Fault | None
            if record.image_id not in listed:
                missing = f"there is no image {record.image_id}"
                fault = Fault("annotations of images that are not listed", missing)
            elif record.category_id not in self._classes:
                missing = f"there is no category {record.category_id}"
                fault = Fault("annotations of categories that are not listed", missing)
            elif record.image_id not in taken:
                continue
            else:
                size = taken[record.image_id].size
                fault = _object_fault(record, size, need_masks)
                if not fault and record.segmentation and not _num_pixels(record.segmentation, size):
                    if need_masks:
                        fault = Fault(_EMPTY, "its mask covers no pixel of the picture")
                    else:
                        invalid_labels.adapt(f"{_EMPTY}, of which the box is taken")
            if record.id is not None:
                seen.setdefault(record.id, []).append(record)
            if fault:
                name = f"number {number + 1}" if record.id is None else record.id
                invalid_labels.add(f"{self.uri}: annotation {name}", fault)
            else:
                taken[record.image_id].objects.append(record)

    def _refuse_other_boxes(self, objects: Sequence[tuple[AnnotationRecord, Size]]) -> None:
        """Refuse a file whose boxes are not (left, top, width, height) in pixels.

        Leaving out those that cannot be so would keep the others, which are as wrong. A single box
        that lies outside its picture may be a slip, and is judged by itself.
        """
        boxes = [(thing, size) for thing, size in objects if thing.bbox is not None]
        if are_shares([thing.bbox for thing, _ in boxes if thing.bbox]):
            raise DataError(
                f"{self.uri}: every box lies within 0 and 1, as shares of the picture do",
                hint="bbox is (left, top, width, height) in pixels",
            )
        if are_shares([polygon for thing, _ in objects for polygon in _polygons(thing)]):
            raise DataError(
                f"{self.uri}: every polygon lies within 0 and 1, as shares of the picture do",
                hint="segmentation is (x, y, x, y, …) in pixels",
            )
        readings = [_read_as(thing) for thing, _ in boxes]
        agreeing = [item for item, read in zip(boxes, readings, strict=True) if read == "corners"]
        outside = [(thing, size) for thing, size in boxes if _overflows(thing.box, size)]
        told = agreeing or (outside if len(outside) > 1 else [])
        fits = all(_are_corners(thing.bbox or (), size) for thing, size in boxes)
        if told and fits and "sizes" not in readings:
            thing, (height, width) = told[0]
            raise DataError(
                f"{self.uri}: boxes are (left, top, right, bottom): {list(thing.bbox or ())} as "
                f"(left, top, width, height) does not fit its mask or its picture of "
                f"{width}x{height} pixels, and every box of the file fits as corners",
                hint="bbox is (left, top, width, height) in pixels",
            )


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


def _adapted(record: AnnotationRecord, invalid_labels: InvalidLabels) -> AnnotationRecord:
    """An object without polygons that span no area, and with a box where its mask gives one."""
    changed: dict[str, Any] = {}
    if record.area is not None and not record.area > 0:
        invalid_labels.adapt("areas that are not positive, measured instead")
        changed["area"] = None
    polygons = record.segmentation
    if isinstance(polygons, list):
        num_polygons = len(polygons)
        polygons = [polygon for polygon in polygons if len(polygon) not in (0, 2, 4)]
        dropped = num_polygons - len(polygons)
        invalid_labels.adapt("polygons of fewer than three points passed over", dropped)
        changed["segmentation"] = polygons or None
        if record.bbox is None and polygons:
            left, top, right, bottom = _extent(polygons)
            changed["bbox"] = left, top, right - left, bottom - top
            invalid_labels.adapt("objects without a box, which is taken from their polygons")
    if record.bbox is None and isinstance(polygons, RunLengths):
        box = _box_of_runs(polygons)
        if box is not None:
            changed["bbox"] = box
            invalid_labels.adapt("objects without a box, which is taken from their mask")
    return record.model_copy(update=changed)


def _object_fault(record: AnnotationRecord, size: Size, need_mask: bool) -> Fault | None:
    """The fault of an object in a picture of (height, width); None where there is none."""
    if record.bbox is None:
        return Fault("objects without a box", "it has no bbox")
    if need_mask and not record.segmentation:
        return Fault("objects without a mask", "it has no mask, which the task needs")
    return box_fault(record.box, size) or _mask_fault(record.segmentation, size)


def _mask_fault(segmentation: RunLengths | list[list[float]] | None, size: Size) -> Fault | None:
    """The fault of a mask for a picture of (height, width); None where there is none."""
    if not segmentation:
        return None
    reason = "masks that do not fit their picture"
    if isinstance(segmentation, RunLengths):
        height, width = segmentation.size
        if segmentation.size != size:
            said = f"its mask is {width}x{height}, the picture {size[1]}x{size[0]} pixels"
            return Fault(reason, said)
        if isinstance(segmentation.counts, list) and sum(segmentation.counts) != height * width:
            runs = sum(segmentation.counts)
            return Fault(reason, f"its mask's runs come to {runs} of {height * width} pixels")
        return (
            None if _can_be_decoded(segmentation) else Fault(reason, "its mask's runs are broken")
        )
    if not all(np.isfinite(polygon).all() for polygon in segmentation):
        return Fault("polygons that are not finite", "a polygon of its mask is not finite")
    if any(len(polygon) % 2 for polygon in segmentation):
        return Fault("polygons of half a point", "a polygon of its mask is not pairs of (x, y)")
    return None


def _num_pixels(segmentation: RunLengths | list[list[float]], size: Size) -> int:
    """Pixels of a picture of (height, width) that a mask covers."""
    from faster_coco_eval.core import mask as mask_api

    if isinstance(segmentation, RunLengths) and isinstance(segmentation.counts, list):
        return sum(segmentation.counts[1::2])
    plain = segmentation.model_dump() if isinstance(segmentation, RunLengths) else segmentation
    return int(mask_api.area(mask_api.segmToRle(plain, size[1], size[0])))


def _box_of_runs(mask: RunLengths) -> tuple[float, float, float, float] | None:
    """The box (left, top, width, height) around a mask; None where it is broken or empty."""
    whole = isinstance(mask.counts, str) or sum(mask.counts) == mask.size[0] * mask.size[1]
    if not whole or not _can_be_decoded(mask):
        return None
    rows, columns = np.nonzero(decode_mask(mask, mask.size))
    if not len(rows):
        return None
    left, top = int(columns.min()), int(rows.min())
    return left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top


def _polygons(thing: AnnotationRecord) -> list[list[float]]:
    return thing.segmentation if isinstance(thing.segmentation, list) else []


def _can_be_decoded(mask: RunLengths) -> bool:
    if isinstance(mask.counts, list):
        return min(mask.counts) >= 0
    try:
        decode_mask(mask, mask.size)
    except (RuntimeError, ValueError):  # as the decoder refuses text that is no run lengths
        return False
    return True


def _extent(polygons: list[list[float]]) -> tuple[float, float, float, float]:
    """The box (left, top, right, bottom) around polygons."""
    x, y = (np.concatenate([polygon[first::2] for polygon in polygons]) for first in (0, 1))
    return float(x.min()), float(y.min()), float(x.max()), float(y.max())


def _overflows(box: Sequence[float], size: Size) -> bool:
    return box[2] > size[1] + EDGE_PX or box[3] > size[0] + EDGE_PX


def _read_as(thing: AnnotationRecord) -> str:
    """`corners` or `sizes`, where a box agrees with its polygons in that reading alone."""
    if not isinstance(thing.segmentation, list):
        return ""
    extent = np.array(_extent(thing.segmentation))
    as_corners, as_sizes = (np.abs(extent - box).max() for box in (thing.bbox, thing.box))
    if as_corners <= _AGREE_PX < as_sizes:
        return "corners"
    return "sizes" if as_sizes <= _AGREE_PX < as_corners else ""


def _are_corners(bbox: Sequence[float], size: Size) -> bool:
    left, top, right, bottom = bbox
    return left < right and top < bottom and not _overflows(bbox, size)
