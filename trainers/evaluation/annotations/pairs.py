"""Folders of pictures, and beside them index masks under the same names."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import PurePosixPath

from mimray.trainers.data.files import (
    is_file,
    is_picture,
    join,
    list_files,
    parent,
)
from mimray.trainers.data.splits import SPLITS
from mimray.trainers.errors import DataError
from mimray.trainers.evaluation.annotations.base import InvalidLabels, SegmentationExample
from mimray.trainers.evaluation.annotations.masks import check_size, read_indices
from mimray.trainers.evaluation.annotations.pictures import PictureFolder, read_lines

MASK_FOLDERS = ("masks", "annotations", "labels")
CLASSES = "classes.txt"


def pair_folders(uri: str) -> dict[str, tuple[str, str]]:
    """Find folders of pictures and of their masks, by split; `` is the key where there is none.

    Looked for are `<split>` beside `<split>annot` (as CamVid has them), `<split>/images` beside
    `<split>/masks`, and `images/<split>` beside `masks/<split>`; `annotations` or `labels` may
    stand for `masks`. Case does not matter.

    Raises:
        DataError: there is nothing at `uri`, or it cannot be read.
    """
    above = {
        str(folder).lower(): str(folder)
        for file in list_files(uri)
        if is_picture(file.path)
        for folder in PurePosixPath(file.path).parents
    }
    found = {}
    for split in sorted(SPLITS):
        tried = [(split, f"{split}annot")]
        tried += [(f"{split}/images", f"{split}/{masks}") for masks in MASK_FOLDERS]
        tried += [(f"images/{split}", f"{masks}/{split}") for masks in MASK_FOLDERS]
        there = [pair for pair in tried if above.keys() >= set(pair)]
        if there:
            images, masks = there[0]
            found[split] = above[images], above[masks]
    if not found:
        beside = [above[masks] for masks in MASK_FOLDERS if masks in above]
        if beside and "images" in above:
            found[""] = above["images"], beside[0]
    return found


class PairFolder:
    """Pictures, each with the mask that has its name; masks are checked when they are read.

    Args:
        uri: the folder above both.
        images: folder of the pictures, relative to it.
        masks: folder of the masks.
        ignore_index: the value of void pixels.
        invalid_labels: counts masks without a picture.

    Attributes:
        uri: the folder above both.
        class_names: lines of `classes.txt`, beside the two folders or at the top; or none.
        ignore_index: the value of void pixels.
    """

    def __init__(
        self,
        uri: str,
        images: str,
        masks: str,
        *,
        ignore_index: int,
        invalid_labels: InvalidLabels,
    ) -> None:
        self.uri = uri
        self.ignore_index = ignore_index
        self._images = PictureFolder.open(join(uri, images))
        self._masks = PictureFolder.open(join(uri, masks))
        self._masks_of: dict[str, list[str]] = defaultdict(list)
        for path in self._masks.num_bytes:
            self._masks_of[_stem(path)].append(path)
        self._paths = list(self._images.num_bytes)
        self._num_pictures = Counter(map(_stem, self._paths))
        alone = sum(
            len(paths) for stem, paths in self._masks_of.items() if stem not in self._num_pictures
        )
        invalid_labels.adapt("masks without a picture of their name passed over", alone)
        places = (parent(join(uri, images)), uri)
        files = [join(place, CLASSES) for place in places if is_file(join(place, CLASSES))]
        self.class_names = _class_names(files[0]) if files else ()

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> SegmentationExample:
        path, stem = self._paths[index], _stem(self._paths[index])
        masks = self._masks_of.get(stem, [])
        if not masks:
            raise DataError(f"there is no mask of its name in {self._masks.uri}")
        if len(masks) > 1:
            raise DataError(f"{self._masks.uri} has two masks of its name, {' and '.join(masks)}")
        if self._num_pictures[stem] > 1:
            raise DataError(f"another picture of {self._images.uri} has its name")
        image = self._images.read(path)
        mask = read_indices(self.label_name(index))
        check_size(self._images, path, mask, self.label_name(index))
        return SegmentationExample(image, mask)

    def name(self, index: int) -> str:
        """Path of a picture."""
        return self._images.name(self._paths[index])

    def label_name(self, index: int) -> str:
        """Path of its mask."""
        masks = self._masks_of.get(_stem(self._paths[index]), [""])
        return self._masks.name(masks[0])

    def is_turned(self, index: int) -> bool:
        """True if EXIF turns a picture."""
        return self._images.header(self._paths[index]).is_turned


def _class_names(uri: str) -> tuple[str, ...]:
    """Names of the classes, one a line; blank lines at the end are none."""
    lines = read_lines(uri)
    if "" in lines:
        raise DataError(
            f"{uri}: line {lines.index('') + 1} is blank", hint="a class a line, by its index"
        )
    return tuple(lines)


def _stem(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))
