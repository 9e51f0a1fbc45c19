"""One picture on its way into a dataset: verified, upright, bounded, otherwise left alone."""

from __future__ import annotations

import io
import threading
from typing import Any, NamedTuple

from PIL import Image, ImageFile

from mimray.trainers.data.decode import (
    AS_STORED,
    Note,
    PictureFile,
    Reading,
    decode,
    resized_short_side,
)

# Visually lossless at a third of PNG's size; full-resolution colour, because the picture has
# just been made small and 4:2:0 would halve its colours again.
JPEG_QUALITY = 92
JPEG_SUBSAMPLING = "4:4:4"
_MOST_BYTES_A_PIXEL = 4  # noise comes to 3
_MOST_BUFFERED_BYTES = 1 << 26
_ENCODING = threading.Lock()

_LOSSLESS = frozenset(("PNG", "GIF", "BMP", "TIFF", "PPM"))


class StoredPicture(NamedTuple):
    """A picture as it will be stored.

    Attributes:
        data: encoded bytes, JPEG or PNG.
        width: columns in pixels.
        height: rows in pixels.
        reencoded: True if `data` differs from what came in.
        notes: conversions that lost something.
    """

    data: bytes
    width: int
    height: int
    reencoded: bool
    notes: tuple[Note, ...] = ()


def canonicalise(
    data: bytes | PictureFile, short_side_px: int | None, reading: Reading = AS_STORED
) -> StoredPicture:
    """Verify a picture by decoding all of it, and re-encode it only if it must change.

    An upright 8-bit RGB or gray JPEG or PNG whose short side is within the bound keeps its
    bytes, metadata included. Others become upright RGB (or gray, if they were), at most
    `short_side_px` on the short side, never enlarged: PNG where a lossless picture keeps its
    size, so that no pixel changes; JPEG (quality 92, 4:4:4) where it is resampled or was
    lossy already. A restart marker stands behind each row of such a JPEG's blocks, so that a crop
    decodes the rows that it needs.

    Args:
        data: the encoded picture, or a file of which each page is canonicalised once.
        short_side_px: bound of the short side; None for no bound.
        reading: what to take of pictures that hold more than 8-bit RGB.

    Raises:
        ImageError: when the picture cannot be used.
    """
    # Large JPEGs decode faster at a scale that is enough for the final resampling.
    draft_size = None if short_side_px is None else (short_side_px, short_side_px)
    file = data if isinstance(data, PictureFile) else PictureFile(data)
    image, header = decode(file, draft_size=draft_size, reading=reading)
    fits = short_side_px is None or min(header.width, header.height) <= short_side_px
    if header.plain and fits:
        return StoredPicture(file.data, header.width, header.height, False, header.notes)
    if not fits:
        assert short_side_px is not None
        image = resized_short_side(image, short_side_px)
    if header.mode in ("1", "L", "LA", "F") or header.mode.startswith("I"):
        image = image.convert("L")
    lossless = fits and header.format in _LOSSLESS
    encoded = _encode(image, lossless)
    return StoredPicture(encoded, image.width, image.height, True, header.notes)


def _encode(image: Image.Image, lossless: bool) -> bytes:
    buffer = io.BytesIO()
    if lossless:
        image.save(buffer, "PNG")
        return buffer.getvalue()
    options: dict[str, Any] = {"quality": JPEG_QUALITY, "subsampling": JPEG_SUBSAMPLING}
    bound_bytes = _MOST_BYTES_A_PIXEL * image.width * image.height
    if bound_bytes > _MOST_BUFFERED_BYTES:
        image.save(buffer, "JPEG", **options)
        return buffer.getvalue()
    # For these two libjpeg needs a buffer that holds the whole file, which Pillow takes from here.
    with _ENCODING:
        before, ImageFile.MAXBLOCK = ImageFile.MAXBLOCK, max(ImageFile.MAXBLOCK, bound_bytes)
        try:
            image.save(buffer, "JPEG", restart_marker_rows=1, optimize=True, **options)
        finally:
            ImageFile.MAXBLOCK = before
    return buffer.getvalue()
