"""Plain JPEGs as arrays: the pixels of Pillow to the bit, in less time.

Whatever is not plain, or damaged in any way, is left to `decode`, which also says what is wrong.
Where a restart marker stands behind each row of blocks, as in what `canonical` encodes, the rows
that a crop needs are decoded alone.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import simplejpeg

# Baseline, extended and progressive frames, with Huffman codes.
_FRAMES = (0xC0, 0xC1, 0xC2)
_PROGRESSIVE = 0xC2
_SCAN = 0xDA
_RESTART_INTERVAL = 0xDD
_UNEXPECTED = (
    *(0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF),  # frames of other kinds
    *(0x01, *range(0xD0, 0xDA)),  # markers without a segment
)
# EXIF or XMP, and Photoshop's resources.
_TAGS = (0xE1, 0xED)
# In coded data a byte of zero follows each 0xFF that is no marker.
_MARKERS = re.compile(rb"\xff[^\x00]")
_END = b"\xff\xd9"
_BLOCK_PX = 8
# Segments that Pillow reads; it refuses a picture whose are shorter.
_LEAST_BYTES = {0xE0: 7, 0xE2: 14, 0xEE: 7}


class Rows(NamedTuple):
    """Rows of blocks (MCU rows) of a JPEG, each of which a restart marker ends.

    Attributes:
        height_at: place in the file of the frame's height, two bytes.
        data_at: place of the coded data.
        num_rows: number of rows.
        height_px: height of a row; the last may be lower.
        context: number of rows on either side that a row's pixels depend on: colours of half the
            height are interpolated.
    """

    height_at: int
    data_at: int
    num_rows: int
    height_px: int
    context: int


class Frame(NamedTuple):
    """The frame of a plain JPEG.

    Attributes:
        size: (width, height) as stored, in pixels.
        tagged: True if its header is for Pillow to judge: it has tags, which may ask for a turn, or
            a segment that is cut short.
        rows: where its header says that rows can be decoded alone; else None.
    """

    size: tuple[int, int]
    tagged: bool
    rows: Rows | None = None


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
    place, tagged, size, frame_at, interval = 2, False, None, 0, 0
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # a byte that fills up
            place += 1
            continue
        if marker in _UNEXPECTED:
            return None
        length = int.from_bytes(data[place + 2 : place + 4])
        segment = data[place + 4 : place + 2 + length]
        if marker == _SCAN:
            if size is None:
                return None
            rows = _rows(data, frame_at, place, interval) if interval else None
            return Frame(size, tagged, rows)
        if marker in _FRAMES:
            if size is not None or len(segment) < 6:
                return None
            precision, colours = segment[0], segment[5]
            size = int.from_bytes(segment[3:5]), int.from_bytes(segment[1:3])
            if precision != 8 or colours not in (1, 3) or 0 in size:
                return None
            frame_at = place
        elif marker == _RESTART_INTERVAL:
            interval = int.from_bytes(segment[:2])
        tagged = tagged or marker in _TAGS or len(segment) < _LEAST_BYTES.get(marker, 0)
        place += 2 + length
    return None


def _rows(data: bytes, frame_at: int, scan_at: int, interval: int) -> Rows | None:
    """The rows of a picture in one sequential scan, if the interval is that of one row."""
    colours = data[frame_at + 9]
    factors = data[frame_at + 11 : frame_at + 10 + 3 * colours : 3]
    header_bytes = int.from_bytes(data[scan_at + 2 : scan_at + 4])
    in_one_scan = data[scan_at + 4 : scan_at + 5] == bytes([colours])
    if data[frame_at + 1] == _PROGRESSIVE or not in_one_scan or len(factors) != colours:
        return None
    # The blocks of a single colour are coded one by one, whatever its factors.
    across = max(f >> 4 for f in factors) if colours > 1 else 1
    down = max(f & 15 for f in factors) if colours > 1 else 1
    height, width = (int.from_bytes(data[frame_at + at : frame_at + at + 2]) for at in (5, 7))
    if not across or not down or interval != -(-width // (_BLOCK_PX * across)):
        return None
    num_rows = -(-height // (_BLOCK_PX * down))
    data_at = scan_at + 2 + header_bytes
    return Rows(frame_at + 5, data_at, num_rows, _BLOCK_PX * down, context=int(down > 1))


def decode_plain(
    data: bytes, frame: Frame, scale: int, needed: tuple[int, int] | None = None
) -> np.ndarray | None:
    """Decode a plain JPEG, without turning it.

    Args:
        data: the encoded picture.
        frame: its frame.
        scale: divisor of its size: 1, 2, 4 or 8.
        needed: the first row of pixels that is needed, and the one behind the last; None for all.

    Returns:
        uint8 [H, W, 3], RGB, where rows that are not needed may hold anything; None where anything
        is wrong with the picture.
    """
    if needed is not None and scale == 1 and frame.rows is not None:
        found = _decode_rows(data, frame.size, frame.rows, needed)
        if found is not None:
            return found
    width, height = (-(-side // scale) for side in frame.size)
    try:
        pixels = simplejpeg.decode_jpeg(
            data, "RGB", min_height=height, min_width=width, min_factor=scale
        )
    except ValueError:  # `decode` says why, or takes it all the same.
        return None
    whole: np.ndarray | None = pixels if pixels.shape == (height, width, 3) else None
    return whole


def _decode_rows(
    data: bytes, size: tuple[int, int], rows: Rows, needed: tuple[int, int]
) -> np.ndarray | None:
    """Decode some rows into their place in the whole picture; None if that is not possible."""
    width, height = size
    first = max(needed[0] // rows.height_px - rows.context, 0)
    end = min(-(-needed[1] // rows.height_px) + rows.context, rows.num_rows)
    top, bottom = first * rows.height_px, min(end * rows.height_px, height)
    cut = _cut_rows(data, rows, first, end, bottom - top)
    if cut is None:
        return None
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    try:
        found = simplejpeg.decode_jpeg(cut, "RGB", buffer=pixels[top:bottom])
    except ValueError:
        return None
    return pixels if found.shape == (bottom - top, width, 3) else None


def _cut_rows(data: bytes, rows: Rows, first: int, end: int, height: int) -> bytes | None:
    """A JPEG of some rows of blocks; None where the markers are not those of whole rows."""
    marks = [match.start() for match in _MARKERS.finditer(data, rows.data_at)]
    wanted = [*(0xD0 + row % 8 for row in range(rows.num_rows - 1)), _END[1]]
    if [data[mark + 1] for mark in marks] != wanted or not data.endswith(_END):
        return None
    start = marks[first - 1] + 2 if first else rows.data_at
    coded = bytearray(data[start : marks[end - 1]])
    for number, mark in enumerate(marks[first : end - 1]):  # they count from the first row
        coded[mark + 1 - start] = 0xD0 + number % 8
    header, height_at = data[: rows.data_at], rows.height_at
    return b"".join((header[:height_at], height.to_bytes(2), header[height_at + 2 :], coded, _END))
