"""Picture files that labels are for, and checks of pictures and boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mimray.trainers.data.decode import decode_rgb, read_size
from mimray.trainers.data.files import is_picture, join, list_files, locate, read_bytes
from mimray.trainers.data.geometry import Size
from mimray.trainers.errors import DataError, ImageError

# Box edges may lie this far outside their picture, and are then cut: tools round, and count pixels
# from 0 or from 1.
EDGE_PX = 1.0

# The size of a picture stands in its first bytes, but for large previews inside of JPEGs.
_HEADER_BYTES = 64 * 1024


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

    def size(self, path: str) -> Size:
        """Upright (height, width) of a picture, from its header.

        Raises:
            ImageError: the file is not a picture.
        """
        filesystem, root = locate(self.uri)
        with filesystem.open_input_file(join(root, path)) as file:
            head = bytes(file.read(_HEADER_BYTES))
        try:
            width, height = read_size(head)
        except ImageError:
            width, height = read_size(read_bytes(filesystem, join(root, path)))
        return height, width

    def fault(self, path: str, size: Size) -> str | None:
        """The fault of a picture, in words; None where there is none.

        Args:
            path: below the folder.
            size: (height, width) that its labels are for.
        """
        if path not in self.num_bytes:
            return f"there is no picture {self.name(path)}"
        try:
            height, width = self.size(path)
        except ImageError as error:
            return f"{self.name(path)}: {error}"
        if (height, width) == size:
            return None
        said = f"{size[1]}x{size[0]}"
        return f"{self.name(path)} has {width}x{height} pixels, its labels are for {said}"

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


def box_fault(box: Sequence[float], size: Size) -> str | None:
    """The fault of a box, in words; None where there is none.

    Args:
        box: (left, top, right, bottom), pixels.
        size: (height, width) of its picture.
    """
    left, top, right, bottom = box
    height, width = size
    shown = ", ".join(f"{side:g}" for side in box)
    if not np.isfinite(box).all():
        return f"the box ({shown}) is not finite"
    if right <= left or bottom <= top:
        return f"the box (left, top, right, bottom) = ({shown}) has no area"
    if min(left, top) < -EDGE_PX or right > width + EDGE_PX or bottom > height + EDGE_PX:
        return f"the box ({shown}) lies outside the picture of {width}x{height} pixels"
    if left >= width or top >= height or right <= 0 or bottom <= 0:
        return f"the box ({shown}) lies outside the picture of {width}x{height} pixels"
    return None
