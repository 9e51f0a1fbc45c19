"""Plain JPEGs as arrays: the pixels of Pillow to the bit, in less time.

Whatever is not plain, or damaged in any way, is left to `decode`, which also says what is wrong.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import simplejpeg

# Baseline, extended and progressive frames, with Huffman codes.
_FRAMES = (0xC0, 0xC1, 0xC2)
_SCAN = 0xDA
_UNEXPECTED = (
    *(0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF),  # frames of other kinds
    *(0x01, *range(0xD0, 0xDA)),  # markers without a segment
)
# EXIF or XMP, and Photoshop's resources.
_TAGS = (0xE1, 0xED)
# Segments that Pillow reads; it refuses a picture whose are shorter.
_LEAST_BYTES = {0xE0: 7, 0xE2: 14, 0xEE: 7}


class Frame(NamedTuple):
    """The frame of a plain JPEG.

    Attributes:
        size: (width, height) as stored, in pixels.
        tagged: True if its header is for Pillow to judge: it has tags, which may ask for a turn, or
            a segment that is cut short.
    """

    size: tuple[int, int]
    tagged: bool


def read_frame(data: bytes) -> Frame | None:
    """Read the frame of a JPEG of 8-bit gray or three colours.

    Args:
        data: the encoded picture.

    Returns:
        None where it is anything else, or its header is damaged.

    Source: ITU-T T.81, annex B.
    """
    if data[:2] != b"\xff\xd8":
        return None
    place, tagged, size = 2, False, None
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # a byte that fills up
            place += 1
            continue
        if marker == _SCAN:
            return None if size is None else Frame(size, tagged)
        if marker in _UNEXPECTED:
            return None
        length = int.from_bytes(data[place + 2 : place + 4])
        segment = data[place + 4 : place + 2 + length]
        if marker in _FRAMES:
            if size is not None or len(segment) < 6:
                return None
            precision, colours = segment[0], segment[5]
            size = int.from_bytes(segment[3:5]), int.from_bytes(segment[1:3])
            if precision != 8 or colours not in (1, 3) or 0 in size:
                return None
        tagged = tagged or marker in _TAGS or len(segment) < _LEAST_BYTES.get(marker, 0)
        place += 2 + length
    return None


def decode_plain(data: bytes, frame: Frame, scale: int) -> np.ndarray | None:
    """Decode a plain JPEG, without turning it.

    Args:
        data: the encoded picture.
        frame: its frame.
        scale: divisor of its size: 1, 2, 4 or 8.

    Returns:
        uint8 [H, W, 3], RGB; None where anything is wrong with it.
    """
    width, height = (-(-side // scale) for side in frame.size)
    try:
        pixels = simplejpeg.decode_jpeg(
            data, "RGB", min_height=height, min_width=width, min_factor=scale
        )
    except ValueError:  # `decode` says why, or takes it all the same.
        return None
    found: np.ndarray | None = pixels if pixels.shape == (height, width, 3) else None
    return found
