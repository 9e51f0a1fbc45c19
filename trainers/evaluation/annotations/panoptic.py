"""COCO panoptic files, read as a class for each pixel."""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel

from mimray.trainers.data.files import is_inside, join
from mimray.trainers.errors import DataError
from mimray.trainers.evaluation.annotations.base import InvalidLabels, SegmentationExample
from mimray.trainers.evaluation.annotations.coco_file import (
    CategoryRecord,
    ImageRecord,
    images_of,
    parse_coco,
    read_coco,
    take_categories,
)
from mimray.trainers.evaluation.annotations.masks import check_size, read_segment_ids
from mimray.trainers.evaluation.annotations.pictures import PictureFolder

# Above any class: masks made from JSON choose their own void.
VOID = 65_535
_LAYOUT = "COCO panoptic has images, categories, and annotations with segments_info"


class SegmentRecord(BaseModel):
    """A segment in the file."""

    id: int
    category_id: int


class PanopticRecord(BaseModel):
    """The segments of a picture, and the PNG that says where they are."""

    image_id: int
    file_name: str
    segments_info: list[SegmentRecord]


class PanopticFile(BaseModel):
    """The part of a COCO panoptic file that is read; it may hold more.

    Source: https://cocodataset.org/#format-data, "Panoptic Segmentation".
    """

    images: list[ImageRecord]
    annotations: list[PanopticRecord]
    categories: list[CategoryRecord]


class CocoPanoptic:
    """Pictures whose segments a JSON file gives classes; they are checked when they are read.

    Classes are the categories in the order of their ids. The PNGs lie in the folder that has the
    JSON file's name. A segment of id 0 is void.

    Args:
        json_uri: the JSON file; pictures are looked for beside it, as for COCO detection.
        invalid_labels: counts categories that are dropped.

    Attributes:
        uri: the JSON file.
        class_names: names of the categories.
        ignore_index: the value of void pixels.

    Raises:
        DataError: the file is missing or not of this kind.
    """

    ignore_index = VOID

    def __init__(self, json_uri: str, invalid_labels: InvalidLabels) -> None:
        self.uri = json_uri
        tree = parse_coco(json_uri, read_coco(json_uri), PanopticFile, _LAYOUT)
        used = {thing.category_id for record in tree.annotations for thing in record.segments_info}
        categories = take_categories(json_uri, tree.categories, used, invalid_labels)
        self.class_names = tuple(record.name for record in categories)
        self._classes = {record.id: label for label, record in enumerate(categories)}
        self._records = tree.annotations
        self._files = {record.id: record.file_name for record in tree.images}
        self._images = PictureFolder.open(images_of(json_uri, tree.images))
        self._segments_uri = json_uri.removesuffix(".json")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> SegmentationExample:
        record = self._records[index]
        path = self._path(index)
        image = self._images.read(path)
        ids = read_segment_ids(self.label_name(index))  # h w
        check_size(self._images, path, ids, self.label_name(index))
        present, places = np.unique(ids, return_inverse=True)
        class_of = {0: VOID}
        for segment in record.segments_info:
            if segment.category_id not in self._classes:
                raise DataError(f"segment {segment.id}: there is no category {segment.category_id}")
            class_of[segment.id] = self._classes[segment.category_id]
        unknown = sorted(set(present.tolist()) - set(class_of))
        if unknown:
            raise DataError(
                f"{self.label_name(index)} has segment {unknown[0]}, which segments_info lacks"
            )
        classes = np.array([class_of[number] for number in present.tolist()])
        return SegmentationExample(image, classes[places].reshape(ids.shape))

    def name(self, index: int) -> str:
        """The annotation of a picture."""
        return f"{self.uri}: image {self._records[index].image_id}"

    def label_name(self, index: int) -> str:
        """Path of its PNG.

        Raises:
            DataError: it leads out of the folder of PNGs.
        """
        name = self._records[index].file_name
        if not is_inside(name):
            raise DataError(f"{self.name(index)}: {name!r} leads out of {self._segments_uri}")
        return join(self._segments_uri, name.replace("\\", "/"))

    def is_turned(self, index: int) -> bool:
        """True if EXIF turns a picture."""
        return self._images.header(self._path(index)).is_turned

    def _path(self, index: int) -> str:
        number = self._records[index].image_id
        if number not in self._files:
            raise DataError(f"there is no image {number}")
        path = self._images.find(self._files[number])
        if path is None:
            raise DataError(f"there is no picture {self._images.name(self._files[number])}")
        return path


def is_panoptic(json_uri: str) -> bool:
    """True if a COCO file is panoptic, False if it is of detection.

    Raises:
        DataError: there is no such file.
    """
    return '"segments_info"' in read_coco(json_uri)
