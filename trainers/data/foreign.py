"""Files that are whole and of a kind that is not read, told by their first bytes."""

from __future__ import annotations

_BRANDS = {
    b"heic": "HEIC",
    b"heix": "HEIC",
    b"heim": "HEIC",
    b"hevc": "HEIC",
    b"hevx": "HEIC",
    b"mif1": "HEIF",
    b"msf1": "HEIF",
    b"crx ": "Canon raw",
}
_BEGINNINGS = {
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"8BPS": "Photoshop",
    b"v/1\x01": "OpenEXR",
    b"II\xbc\x01": "JPEG XR",
    b"%PDF": "PDF",
    b"FUJIFILM": "Fujifilm raw",
}
_START_OF_FRAME = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC)))
_START_OF_FRAME |= frozenset(range(0xCD, 0xD0))
_LOSSLESS = frozenset((0xC3, 0xC7, 0xCB, 0xCF))


def foreign_format(data: bytes) -> str | None:
    """The name of a picture format that is not read; None for others."""
    if data[4:8] == b"ftyp" and data[8:12] in _BRANDS:
        return _BRANDS[data[8:12]]
    if data[128:132] == b"DICM":
        return "DICOM"
    return next((name for start, name in _BEGINNINGS.items() if data.startswith(start)), None)


def unsupported_jpeg(data: bytes) -> str | None:
    """The reason why a JPEG is of a kind that is not read, for people; None for the usual kind."""
    if not data.startswith(b"\xff\xd8"):
        return None
    start = 2
    while start + 5 <= len(data) and data[start] == 0xFF:
        marker = data[start + 1]
        if marker in _START_OF_FRAME:
            if data[start + 4] != 8:
                return f"JPEG of {data[start + 4]} bits a channel; 8 can be read"
            return "lossless JPEG, which is not read" if marker in _LOSSLESS else None
        start += 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    return None
