"""Folders of pictures, and beside them index masks under the same names."""

from __future__ import annotations

from pathlib import PurePosixPath

from mimray.trainers.data.files import (
    SPLITS,
    is_file,
    is_picture,
    join,
    list_files,
    locate,
    parent,
    read_bytes,
)
from mimray.trainers.errors import DataError
from mimray.trainers.evaluation.annotations.base import SegmentationExample
from mimray.trainers.evaluation.annotations.masks import check_size, read_indices
from mimray.trainers.evaluation.annotations.pictures import PictureFolder

MASK_FOLDERS = ("masks", "annotations", "labels")
CLASSES = "classes.txt"


def pair_folders(uri: str) -> dict[str, tuple[str, str]]:
    """Find folders of pictures and of their masks, by split; `` is the key where there is none.

    Looked for are `<split>` beside `<split>annot` (as CamVid has them), `<split>/images` beside
    `<split>/masks`, and `images/<split>` beside `masks/<split>`; `annotations` or `labels` may
    stand for `masks`.

    Raises:
        DataError: there is nothing at `uri`, or it cannot be read.
    """
    above = {
        str(folder)
        for file in list_files(uri)
        if is_picture(file.path)
        for folder in PurePosixPath(file.path).parents
    }
    found = {}
    for split in sorted(SPLITS):
        tried = [(split, f"{split}annot")]
        tried += [(f"{split}/images", f"{split}/{masks}") for masks in MASK_FOLDERS]
        tried += [(f"images/{split}", f"{masks}/{split}") for masks in MASK_FOLDERS]
        there = [pair for pair in tried if above.issuperset(pair)]
        if there:
            found[split] = there[0]
    if not found:
        there = [("images", masks) for masks in MASK_FOLDERS if masks in above]
        if there and "images" in above:
            found[""] = there[0]
    return found


class PairFolder:
    """Pictures, each with the mask that has its name; masks are checked when they are read.

    Args:
        uri: the folder above both.
        images: folder of the pictures, relative to it.
        masks: folder of the masks.
        ignore_index: the value of void pixels.

    Attributes:
        uri: the folder above both.
        class_names: lines of `classes.txt`, beside the two folders or at the top; or none.
        ignore_index: the value of void pixels.
    """

    def __init__(self, uri: str, images: str, masks: str, *, ignore_index: int) -> None:
        self.uri = uri
        self.ignore_index = ignore_index
        self._images = PictureFolder.open(join(uri, images))
        self._masks = PictureFolder.open(join(uri, masks))
        mask_of = {_stem(path): path for path in self._masks.num_bytes}
        self._pairs = [(path, mask_of.get(_stem(path))) for path in self._images.num_bytes]
        places = (parent(join(uri, images)), uri)
        files = [join(place, CLASSES) for place in places if is_file(join(place, CLASSES))]
        self.class_names = (
            tuple(read_bytes(*locate(files[0])).decode().splitlines()) if files else ()
        )

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> SegmentationExample:
        image_path, mask_path = self._pairs[index]
        if mask_path is None:
            raise DataError(f"there is no mask of its name in {self._masks.uri}")
        image = self._images.read(image_path)
        mask = read_indices(self._masks.name(mask_path))
        check_size(image, mask, self._masks.name(mask_path))
        return SegmentationExample(image, mask)

    def name(self, index: int) -> str:
        """Path of a picture."""
        return self._images.name(self._pairs[index][0])

    def label_name(self, index: int) -> str:
        """Path of its mask."""
        return self._masks.name(self._pairs[index][1] or "")


def _stem(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))
