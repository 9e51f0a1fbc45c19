"""Picture files that labels are for, and checks of pictures and boxes."""

from __future__ import annotations

import codecs
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image
from pyarrow import fs as pafs

from mimray.trainers.data.decode import decode_rgb, read_orientation, read_size
from mimray.trainers.data.files import (
    is_inside,
    is_picture,
    join,
    list_files,
    locate,
    read_bytes,
)
from mimray.trainers.data.geometry import Size
from mimray.trainers.errors import DataError, ImageError
from mimray.trainers.evaluation.annotations.base import Fault, InvalidLabels

# Box edges may lie this far outside their picture, and are then cut: tools round, and count pixels
# from 0 or from 1.
EDGE_PX = 1.0

# The size of a picture stands in its first bytes, but for large previews inside of JPEGs.
_HEADER_BYTES = 64 * 1024

_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
TURNED = "pictures that EXIF turns; their labels are taken for the upright picture"


@dataclass(frozen=True)
class PictureFolder:
    """Picture files below a folder.

    Attributes:
        uri: URI of the folder.
        num_bytes: size of each file, by its path below the folder.
    """

    uri: str
    num_bytes: dict[str, int]

    @classmethod
    def open(cls, uri: str) -> PictureFolder:
        """List the picture files below a folder.

        Args:
            uri: URI of the folder.

        Raises:
            DataError: nothing is there, or it cannot be read.
        """
        files = list_files(uri)
        return cls(uri, {file.path: file.num_bytes for file in files if is_picture(file.path)})

    def name(self, path: str) -> str:
        """Path of a picture, for messages."""
        return join(self.uri, path)

    def find(self, file_name: str) -> str | None:
        r"""The path below the folder that a file name of labels means; None where there is none.

        `./` and doubled slashes are dropped, and `\\` is read as `/` where no file has it in its
        name. A file that listing passes over, such as one whose name begins with `_`, is found by
        its name all the same. One that leads out of the folder means none.
        """
        if not is_inside(file_name):
            return None
        for name in (file_name, file_name.replace("\\", "/")):
            path = posixpath.normpath(name) if name else ""
            if path in self.num_bytes:
                return path
        filesystem, root = locate(self.uri)
        info = filesystem.get_file_info(join(root, path))
        if not path or info.type != pafs.FileType.File:
            return None
        self.num_bytes[path] = info.size
        return path

    def header(self, path: str) -> PictureHeader:
        """Size and orientation of a picture, from its first bytes.

        Raises:
            ImageError: the file is not a picture.
        """
        filesystem, root = locate(self.uri)
        with filesystem.open_input_file(join(root, path)) as file:
            head = bytes(file.read(_HEADER_BYTES))
        try:
            return PictureHeader.read(head)
        except ImageError:
            return PictureHeader.read(read_bytes(filesystem, join(root, path)))

    def checked_size(
        self, path: str, stated: Size | None, invalid_labels: InvalidLabels
    ) -> Size | Fault:
        """The size of a picture, held against what its labels say.

        Args:
            path: below the folder.
            stated: (height, width) that its labels are for; None where they do not say it.
            invalid_labels: counts pictures that EXIF turns without another size.
        """
        try:
            size, is_turned = self.header(path)
        except ImageError as error:
            return Fault("pictures that cannot be read", f"{self.name(path)}: {error}")
        if stated in (None, size):
            invalid_labels.adapt(TURNED, int(is_turned))
            return size
        return size_fault(self.name(path), size, stated, is_turned=is_turned)

    def read(self, path: str) -> Image.Image:
        """One picture, upright, RGB.

        Raises:
            DataError: it cannot be decoded.
        """
        filesystem, root = locate(self.uri)
        try:
            return decode_rgb(read_bytes(filesystem, join(root, path)))
        except ImageError as error:
            raise DataError(f"{self.name(path)}: {error}", hint="mend or remove it") from error


class PictureHeader(NamedTuple):
    """Facts that the header of a picture states.

    Attributes:
        size: upright (height, width), pixels.
        is_turned: True if EXIF turns or mirrors it, so that stored pixels lie otherwise.
    """

    size: Size
    is_turned: bool

    @classmethod
    def read(cls, data: bytes) -> PictureHeader:
        """Read a header.

        Args:
            data: the encoded picture, or the beginning of it.

        Raises:
            ImageError: it is not a picture.
        """
        width, height = read_size(data)
        return cls((height, width), read_orientation(data) != 1)


def size_fault(name: str, size: Size, stated: Size, *, is_turned: bool) -> Fault:
    """The fault of a picture whose labels are for another size.

    Args:
        name: path of the picture.
        size: upright (height, width) of the picture.
        stated: (height, width) that its labels are for.
        is_turned: True if EXIF turns the picture.
    """
    height, width = size
    said = f"{stated[1]}x{stated[0]}"
    if is_turned and stated == (width, height):
        return Fault(
            "pictures that EXIF turns",
            f"{name} has {width}x{height} pixels once EXIF has turned it, its labels are for "
            f"{said} as stored: remove its EXIF orientation, or turn the labels",
        )
    return Fault(
        "pictures of another size than their labels",
        f"{name} has {width}x{height} pixels, its labels are for {said}",
    )


def read_text(uri: str) -> str:
    """The text of a list or an annotation file, in UTF-8 or in UTF-16, with or without a mark.

    Raises:
        DataError: it is in another encoding.
        FileNotFoundError: there is no such file.
    """
    content = read_bytes(*locate(uri))
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{uri} is not UTF-8 text: {error.reason} at byte {error.start}",
            hint="save it as UTF-8",
        ) from None


def box_fault(box: Sequence[float], size: Size) -> Fault | None:
    """The fault of a box; None where there is none.

    Args:
        box: (left, top, right, bottom), pixels.
        size: (height, width) of its picture.
    """
    left, top, right, bottom = box
    height, width = size
    shown = ", ".join(f"{side:g}" for side in box)
    if not np.isfinite(box).all():
        return Fault("boxes that are not finite", f"the box ({shown}) is not finite")
    if right <= left or bottom <= top:
        return Fault(
            "boxes without area", f"the box (left, top, right, bottom) = ({shown}) has no area"
        )
    beyond = min(left, top) < -EDGE_PX or right > width + EDGE_PX or bottom > height + EDGE_PX
    if beyond or left >= width or top >= height or right <= 0 or bottom <= 0:
        return Fault(
            "boxes outside their picture",
            f"the box ({shown}) lies outside the picture of {width}x{height} pixels",
        )
    return None


def are_shares(values: Sequence[Sequence[float]]) -> bool:
    """True if coordinates are shares of a picture: all within 0 and 1, and some between them.

    Whole numbers are pixels: an object of one pixel at the corner lies within 0 and 1 as well.
    """
    within = bool(values) and all(max(item) <= 1 for item in values)
    return within and any(0 < value < 1 for item in values for value in item)


def read_lines(uri: str) -> list[str]:
    """Lines of a list, stripped; blank ones stay, but for those at the end.

    Only carriage returns and line feeds end a line: names may hold Unicode's other separators.

    Raises:
        DataError: it is in another encoding.
        FileNotFoundError: there is no such file.
    """
    return [line.strip() for line in re.split(r"\r\n?|\n", read_text(uri).rstrip())]
