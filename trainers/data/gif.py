"""Frames of a GIF, counted up to a limit: Pillow reads all of them, however many there are."""

from __future__ import annotations

MAGIC = b"GIF8"

_HEADER_BYTES, _DESCRIPTOR_BYTES = 13, 9
_IMAGE, _EXTENSION = 0x2C, 0x21
_HAS_COLOURS, _NUM_COLOURS = 0x80, 0x07


def has_more_frames(data: bytes, limit: int) -> bool:
    """True if a GIF has more frames than a limit; what follows the first too many is not read.

    Args:
        data: the encoded file; one that is cut short has the frames that begin in it.
        limit: most frames.

    Source: GIF89a specification, appendix A.
    """
    if len(data) < _HEADER_BYTES:
        return False
    place = _HEADER_BYTES + _table_bytes(data[10])
    frames = 0
    while place < len(data):
        kind = data[place]
        if kind == _IMAGE and place + _DESCRIPTOR_BYTES < len(data):
            frames += 1
            if frames > limit:
                return True
            # The colours of the frame, and the size of its codes.
            place += 1 + _DESCRIPTOR_BYTES + _table_bytes(data[place + _DESCRIPTOR_BYTES]) + 1
        elif kind == _EXTENSION:
            place += 2
        else:  # the trailer, or nothing that a GIF has
            return False
        place = _after_blocks(data, place)
    return False


def _table_bytes(packed: int) -> int:
    """Bytes of the colours that a byte of flags tells of."""
    return 3 * 2 ** ((packed & _NUM_COLOURS) + 1) if packed & _HAS_COLOURS else 0


def _after_blocks(data: bytes, place: int) -> int:
    """The place behind blocks of up to 255 bytes, each with its length before it, and their end."""
    while place < len(data) and data[place]:
        place += 1 + data[place]
    return place + 1
