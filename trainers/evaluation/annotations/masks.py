"""Masks as picture files: a class or a segment's id for each pixel."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from mimray.trainers.data.decode import FORMATS
from mimray.trainers.data.files import locate, read_bytes
from mimray.trainers.errors import DataError

# Palette, gray, one bit, and the two ways Pillow holds 16 bits.
_INDEX_MODES = ("P", "L", "1", "I;16", "I")
# A segment's id is R + 256 G + 65536 B of its colour.
_ID_OF_COLOUR = np.array([1, 256, 65_536])


def read_indices(uri: str) -> np.ndarray:
    """An index mask, int64 [h, w]: each pixel a number, never a colour.

    Raises:
        DataError: it is not there, cannot be decoded, or holds colours.
    """
    image = _read(uri)
    if image.mode not in _INDEX_MODES:
        raise DataError(
            f"{uri} holds colours ({image.mode})", hint="a mask holds the class of each pixel"
        )
    return np.asarray(image).astype(np.int64)


def read_segment_ids(uri: str) -> np.ndarray:
    """Ids that are stored as colours, int64 [h, w].

    Raises:
        DataError: it is not there, cannot be decoded, or holds no colours.

    Source: https://github.com/cocodataset/panopticapi (`rgb2id`)
    """
    image = _read(uri)
    if image.mode != "RGB":
        raise DataError(f"{uri} holds no RGB colours ({image.mode})")
    ids: np.ndarray = np.asarray(image).astype(np.int64) @ _ID_OF_COLOUR
    return ids


def check_size(image: Image.Image, mask: np.ndarray, mask_uri: str) -> None:
    """Refuse a mask [h, w] of another size than its picture's.

    Raises:
        DataError: naming the mask and both sizes.
    """
    height, width = mask.shape
    if image.size != (width, height):
        raise DataError(
            f"{mask_uri} is {width}x{height} pixels, its picture {image.width}x{image.height}"
        )


def _read(uri: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(read_bytes(*locate(uri))), formats=FORMATS)
        image.load()
    except FileNotFoundError as error:
        raise DataError(f"there is no mask {uri}") from error
    except Exception as error:  # Pillow's readers raise nearly anything on broken bytes.
        raise DataError(f"{uri} cannot be decoded: {error}") from error
    return image
