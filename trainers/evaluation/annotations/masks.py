"""Masks as picture files: a class or a segment's id for each pixel."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from mimray.trainers.data.decode import FORMATS, raw_mode
from mimray.trainers.data.files import locate, read_bytes
from mimray.trainers.errors import DataError
from mimray.trainers.evaluation.annotations.pictures import PictureFolder

# Formats that keep every number as it was. Those of cameras and of the web round them, and programs
# that write GIF renumber its palette.
_LOSSLESS = ("PNG", "TIFF", "BMP", "PPM")
# Compressions of a TIFF that do not.
_LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp")
# Pillow spreads gray of two and four bits over 0 to 255; stored are multiples of these.
_SPREAD = {"L;2": 85, "L;4": 17}
# Palette, gray, one bit, and the ways Pillow holds 16 bits.
_INDEX_MODES = ("P", "L", "1", "I;16", "I;16B", "I")
# A segment's id is R + 256 G + 65536 B of its colour.
_ID_OF_COLOUR = np.array([1, 256, 65_536])


def read_indices(uri: str) -> np.ndarray:
    """An index mask, int64 [h, w]: each pixel a number, never a colour.

    Gray that is stored as equal red, green and blue, and whole numbers stored as floats, are read
    as the numbers they are.

    Raises:
        DataError: it is not there, cannot be decoded, holds colours, or was compressed with loss.
    """
    image, layout = _read(uri)
    stored = np.asarray(image)
    values = None
    if image.mode in ("RGB", "RGBA", "LA"):
        values = _gray_of(stored)
    elif image.mode in _INDEX_MODES or (
        image.mode == "F" and np.array_equal(stored, np.trunc(stored))
    ):
        values = stored
    if values is None:
        raise DataError(
            f"{uri} holds colours ({image.mode})",
            hint="a mask holds the class of each pixel: 0, 1, … in gray or by palette",
        )
    indices: np.ndarray = values.astype(np.int64) // _SPREAD.get(layout, 1)
    return indices


def _gray_of(values: np.ndarray) -> np.ndarray | None:
    """One channel [h, w] of pixels [h, w, C] whose colours are equal and opaque, else None."""
    num_colours = 1 if values.shape[2] == 2 else 3
    gray, alpha = values[..., 0], values[..., num_colours:]
    equal = (values[..., :num_colours] == gray[..., None]).all() and (alpha == 255).all()
    return gray if equal else None


def read_segment_ids(uri: str) -> np.ndarray:
    """Ids that are stored as colours, int64 [h, w].

    Raises:
        DataError: it is not there, cannot be decoded, or holds no colours.

    Source: https://github.com/cocodataset/panopticapi (`rgb2id`)
    """
    image, _ = _read(uri)
    if image.mode != "RGB":
        raise DataError(f"{uri} holds no RGB colours ({image.mode})")
    ids: np.ndarray = np.asarray(image).astype(np.int64) @ _ID_OF_COLOUR
    return ids


def check_size(folder: PictureFolder, path: str, mask: np.ndarray, mask_uri: str) -> None:
    """Refuse a mask [h, w] of another size than its picture's.

    Raises:
        DataError: naming the mask and both sizes.
        ImageError: the picture cannot be read.
    """
    size, is_turned = folder.header(path)
    if size != mask.shape:
        (height, width), (rows, columns) = size, mask.shape
        turned = " once EXIF has turned it" if is_turned and mask.shape == (width, height) else ""
        raise DataError(
            f"{mask_uri} is {columns}x{rows} pixels, its picture {width}x{height}{turned}",
            hint="remove its EXIF orientation, or turn the mask" if turned else "",
        )


def _read(uri: str) -> tuple[Image.Image, str]:
    """A mask as Pillow decodes it, and the layout of its pixels in the file."""
    try:
        image = Image.open(io.BytesIO(read_bytes(*locate(uri))), formats=FORMATS)
        lossy = image.format not in _LOSSLESS or image.info.get("compression") in _LOSSY_TIFF
        layout = raw_mode(image)
        if not lossy:
            image.load()
    except FileNotFoundError as error:
        raise DataError(f"there is no mask {uri}") from error
    except Exception as error:  # Pillow's readers raise nearly anything on broken bytes.
        raise DataError(f"{uri} cannot be decoded: {error}") from error
    if lossy:
        raise DataError(
            f"{uri} is stored as {image.format}, which changes indices",
            hint="save masks as PNG, from the originals",
        )
    return image, layout
