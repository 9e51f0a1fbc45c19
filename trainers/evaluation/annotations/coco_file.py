"""Files of the COCO family: what stands in them, where their pictures lie, and their categories."""

from __future__ import annotations

from collections import Counter
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError, ValidationInfo, field_validator

from mimray.trainers.data.files import is_file, join, parent
from mimray.trainers.data.geometry import Size
from mimray.trainers.errors import DataError, EmptyDatasetError
from mimray.trainers.evaluation.annotations.base import InvalidLabels
from mimray.trainers.evaluation.annotations.pictures import read_text

DETECTION_LAYOUT = "COCO detection has images, annotations and categories"
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
    """A picture in the file; without a size, its own is taken."""

    id: int
    file_name: str
    height: int | None = None
    width: int | None = None

    @property
    def stated_size(self) -> Size | None:
        """(height, width); None where the file does not say it, or says 0."""
        return (self.height, self.width) if self.height and self.width else None


class AnnotationRecord(BaseModel):
    """An object in the file; `bbox` is (left, top, width, height) in pixels."""

    id: int | str | None = None
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float] | None = None
    segmentation: RunLengths | list[list[float]] | None = None
    area: float | None = None
    iscrowd: bool = False

    @field_validator("bbox", "segmentation", mode="before")
    @classmethod
    def _none_where_empty(cls, value: Any, field: ValidationInfo) -> Any:
        flat = isinstance(value, list) and all(isinstance(item, int | float) for item in value)
        return (
            ([value] if flat and field.field_name == "segmentation" else value) if value else None
        )

    @field_validator("iscrowd", mode="before")
    @classmethod
    def _no_crowd_where_null(cls, value: Any) -> Any:
        return False if value is None else value

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom), pixels."""
        assert self.bbox is not None
        left, top, width, height = self.bbox
        return left, top, left + width, top + height


class CategoryRecord(BaseModel):
    """A class in the file, and the class above it."""

    id: int
    name: str
    supercategory: str | None = None


class CocoFile(BaseModel):
    """The part of a COCO detection file that is read; it may hold more.

    Source: https://cocodataset.org/#format-data
    """

    images: list[ImageRecord]
    annotations: list[AnnotationRecord] = []
    categories: list[CategoryRecord]


def take_categories(
    uri: str, records: list[CategoryRecord], used: set[int], invalid_labels: InvalidLabels
) -> list[CategoryRecord]:
    """The categories that are classes, in the order of their ids.

    A category that stands in the file twice is taken once. One that labels nothing is no class
    where it is the others' supercategory, or where it has the name of another.

    Args:
        uri: URI of the file, for messages.
        records: categories of the file.
        used: ids of the categories that label something.
        invalid_labels: counts what is dropped.

    Raises:
        DataError: two categories share an id, or a name while both are used.
    """
    distinct = {(record.id, record.name): record for record in records}
    invalid_labels.adapt("categories that stand in the file twice", len(records) - len(distinct))
    above = {r.supercategory for r in distinct.values() if r.supercategory != r.name}
    names = Counter(record.name for record in distinct.values())
    kept: list[CategoryRecord] = []
    for record in sorted(distinct.values(), key=lambda record: (record.id not in used, record.id)):
        is_root = record.name in above
        is_double = names[record.name] > 1 and any(record.name == other.name for other in kept)
        if record.id not in used and (is_root or is_double):
            invalid_labels.adapt("categories above others or named like another, without objects")
        else:
            kept.append(record)
    ids = {record.id for record in kept}
    if len(ids) < len(kept) or len({record.name for record in kept}) < len(kept):
        raise DataError(f"{uri}: two categories share an id or a name", hint="give each its own")
    return sorted(kept, key=lambda record: record.id)


def images_of(json_uri: str, records: list[ImageRecord]) -> str:
    """The folder that the pictures of a file lie in."""
    if not records:
        raise EmptyDatasetError(f"{json_uri} lists no images", hint=DETECTION_LAYOUT)
    folder, stem = parent(json_uri), json_uri.rpartition("/")[2].partition(".")[0]
    split = stem.removeprefix("instances_").removeprefix("panoptic_")
    below, above = ("images", split, f"images/{split}"), (f"images/{split}", split, "images")
    places = [*(join(folder, name) for name in below), folder]
    places += [join(parent(folder), name) for name in above]
    # A few, since the first picture may be what is missing.
    names = [record.file_name for record in records[:_PROBED]]
    names += [name.replace("\\", "/") for name in names if "\\" in name]
    for place in places:
        if any(is_file(join(place, name)) for name in names):
            return place
    looked = ", ".join(places)
    raise DataError(
        f"{json_uri}: none of its pictures is where it should be, such as {names[0]}",
        hint=f"looked in {looked}",
    )


def read_coco(uri: str) -> str:
    """Read the text of an annotation file.

    Raises:
        DataError: there is none, or it is not text.
    """
    if not is_file(uri):
        raise DataError(f"no annotation file at {uri}", hint="check the path")
    return read_text(uri)


_Tree = TypeVar("_Tree", bound=BaseModel)


def parse_coco(uri: str, content: str, kind: type[_Tree], layout: str) -> _Tree:
    """Parse a COCO file.

    Args:
        uri: URI of the file, for messages.
        content: text of the file.
        kind: class of what the file holds.
        layout: the keys that such a file has, as a sentence.

    Raises:
        DataError: it is not JSON, or of another layout.
    """
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"])
        value = first["input"]
        shown = f" ({value!r})" if place and isinstance(value, str | int | float) else ""
        of_id = first["type"].startswith("int_")
        raise DataError(
            f"{uri}: {(place.lstrip('.') + ': ') if place else ''}{first['msg']}{shown}",
            hint="ids and sizes are whole numbers" if of_id else layout,
        ) from None
