"""Encoded pictures for tests of decoding."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """A picture as bytes, by Pillow."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def turned(orientation: int) -> Image.Exif:
    """EXIF that says how a picture is turned, 1 to 8."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif
