"""PNG chunks: those that pixels need are kept, the rest is never a reason to refuse a picture."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

SIGNATURE = b"\x89PNG\r\n\x1a\n"

# Text may hold the orientation (XMP, or EXIF as ImageMagick writes it). So much of it is kept,
# unpacked, over all chunks together: below Pillow's own bound of a single one.
MAX_TEXT_BYTES = 1 << 20
# So much is unpacked to find it.
MAX_UNPACKED_BYTES = 8 << 20

_NEEDED = frozenset((b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"acTL", b"fcTL", b"fdAT"))
_TEXT = frozenset((b"tEXt", b"zTXt", b"iTXt"))
_ORIENTED = frozenset((b"XML:com.adobe.xmp", b"Raw profile type exif"))
_MAX_KEYWORD_BYTES = 79


class Chunk(NamedTuple):
    """A chunk: its type, and its place in the file from its length to its checksum."""

    name: bytes
    start: int
    end: int


def without_metadata(data: bytes) -> bytes:
    """Leave out of a PNG what its pixels do not need: colour profile, text, what is damaged.

    Its pixels, frames and orientation stay. The work is bounded by the file's size and
    `MAX_UNPACKED_BYTES`, whatever its chunks unpack to.

    Args:
        data: any bytes; what is not a PNG, or has a cut chunk, comes back as it is from there on.
    """
    if not data.startswith(SIGNATURE):
        return data
    view = memoryview(data)
    kept: list[memoryview] = [view[: len(SIGNATURE)]]
    end = len(SIGNATURE)
    room, work = MAX_TEXT_BYTES, MAX_UNPACKED_BYTES
    for name, start, end in _chunks(data):
        if name in _NEEDED or _is_critical(name):
            kept.append(view[start:end])
        elif name == b"eXIf":
            if _is_intact(view, start, end):
                kept.append(view[start:end])
        elif name in _TEXT and _is_oriented(view, start, end) and _is_intact(view, start, end):
            limit = min(room, work)
            num_bytes = _text_bytes(name, data[start + 8 : end - 4], limit)
            work -= min(num_bytes, limit)
            if num_bytes <= limit:
                room -= num_bytes
                kept.append(view[start:end])
    kept.append(view[end:])
    return data if sum(map(len, kept)) == len(data) else b"".join(kept)


def significant_bits(data: bytes) -> int | None:
    """The bits of a gray sample that its `sBIT` chunk calls significant; None without one."""
    if data.startswith(SIGNATURE):
        for name, start, end in _chunks(data):
            if name == b"IDAT":
                break
            if name == b"sBIT" and end - start == 12 + 1:
                return data[start + 8]
    return None


def _chunks(data: bytes) -> Iterator[Chunk]:
    start = len(SIGNATURE)
    while start + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        if end > len(data):
            return
        yield Chunk(name, start, end)
        start = end


def _is_critical(name: bytes) -> bool:
    return not name[0] & 0x20


def _is_intact(view: memoryview, start: int, end: int) -> bool:
    (stated,) = struct.unpack_from(">I", view, end - 4)
    return bool(zlib.crc32(view[start + 4 : end - 4]) == stated)


def _is_oriented(view: memoryview, start: int, end: int) -> bool:
    """True if a text chunk is of a kind that may tell the orientation."""
    head = bytes(view[start + 8 : min(start + 8 + _MAX_KEYWORD_BYTES + 1, end - 4)])
    return head.partition(b"\0")[0] in _ORIENTED


def _text_bytes(name: bytes, content: bytes, limit: int) -> int:
    """Bytes that a text chunk unpacks to, or more than `limit` where it is more or damaged."""
    if name == b"tEXt":
        return len(content)
    keyword, _, rest = content.partition(b"\0")
    if name == b"zTXt":
        packed = rest[1:]
    else:
        if rest[:1] != b"\1":
            return len(content)
        packed = rest[2:].split(b"\0", 2)[-1]
    try:
        return len(keyword) + len(zlib.decompressobj().decompress(packed, limit + 1))
    except zlib.error:
        return limit + 1
