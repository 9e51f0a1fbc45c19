"""From encoded bytes to an upright 8-bit RGB picture, or an `ImageError` that says why not.

Every picture of the project, whether ingested, trained on or served, goes through `decode`.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from mimray.trainers.errors import ImageError

# Pillow warns above this many pixels; taking the same number means that no accepted picture
# ever triggers that warning.
MAX_PIXELS = 89_478_485
MIN_SIDE_PX = 2

# A JPEG that is decoded at a lower scale keeps so many times the pixels that are needed along each
# side. Resampled from just enough of them, views of photographs lose 7 to 10 % of their gradient
# energy (benchmarks/jpeg_draft.py).
DRAFT_MARGIN = 2

# What is transparent is laid on white, as browsers and printers do.
BACKGROUND = (255, 255, 255)

# Named, because Pillow's full list holds formats that start other programs (EPS) or read
# only under Windows (WMF).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

# Formats that are decoded at a lower scale where that is enough.
DRAFTED = ("JPEG", "MPO")

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*")


@dataclass(frozen=True)
class Header:
    """Facts that a picture's file states about it.

    Attributes:
        format: Pillow's name of the format, e.g. `JPEG`.
        mode: Pillow's name of the stored pixel layout, e.g. `RGB`, `L`, `CMYK`.
        width: columns of the upright picture, in pixels.
        height: rows of the upright picture, in pixels.
        orientation: the EXIF orientation, 1 to 8; 1 is upright.
        plain: one upright frame of 8-bit RGB or gray pixels, which decodes to what is stored.
    """

    format: str
    mode: str
    width: int
    height: int
    orientation: int
    plain: bool


class Decoded(NamedTuple):
    """A decoded picture and what its file said."""

    image: Image.Image
    header: Header


def decode(
    data: bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    min_side_px: int = MIN_SIDE_PX,
    max_frames: int | None = None,
    draft_size: tuple[int, int] | None = None,
) -> Decoded:
    """Decode a whole picture to upright 8-bit RGB.

    Palettes, CMYK (by the plain formula, without its colour profile), alpha (on white), one
    bit and 16 bits a pixel (the full 16-bit range onto 8 bits) are converted; of an animation
    the first frame is taken.

    Args:
        data: the encoded picture.
        max_pixels: pictures with more pixels are refused from their header, before decoding.
        min_side_px: pictures with a shorter side are refused.
        max_frames: files with more frames or pages are refused.
        draft_size: (width, height) of the upright picture that is enough for the caller; a
            JPEG is then decoded at 1/2, 1/4 or 1/8 where that still covers it twice along each
            side. Others ignore it.

    Returns:
        The picture, mode RGB, and its header (whose size is the stored one, not the draft's).

    Raises:
        ImageError: with reason `empty`, `not_an_image`, `too_large`, `too_small`, `truncated`,
            `too_many_frames`, `broken` or `unsupported_mode`.
    """
    image = _open(data)
    try:
        _check_size(image, max_pixels, min_side_px)
        frames = getattr(image, "n_frames", 1) if max_frames is not None else 1
        if max_frames is not None and frames > max_frames:
            raise ImageError(
                "too_many_frames", f"{frames} frames are more than the allowed {max_frames}"
            )
        stored_size, mode, layout = image.size, image.mode, raw_mode(image)
        if draft_size is not None and image.format in DRAFTED:
            width, height = draft_size[::-1] if _orientation(image) >= 5 else draft_size
            image.draft(None, (DRAFT_MARGIN * width, DRAFT_MARGIN * height))
        image.load()
        # Only now: a PNG may carry its EXIF behind the pixels, and TIFFs turn while loading.
        orientation = _orientation(image)
        pixels = _to_rgb(image)
        if orientation != 1:
            pixels = pixels.transpose(_UPRIGHT[orientation])
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers raise nearly anything on broken bytes.
        raise _as_image_error(error) from error
    width, height = stored_size[::-1] if orientation >= 5 else stored_size
    plain = (
        image.format in ("JPEG", "PNG")
        and mode in ("RGB", "L")
        and layout in ("RGB", "L", "")
        and orientation == 1
        and not image.has_transparency_data
        and not getattr(image, "is_animated", False)
    )
    header = Header(str(image.format), mode, width, height, orientation, plain)
    return Decoded(pixels, header)


def decode_rgb(
    data: bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    min_side_px: int = MIN_SIDE_PX,
    draft_size: tuple[int, int] | None = None,
) -> Image.Image:
    """Decode a picture to upright RGB; `decode` without the header, same arguments and errors."""
    return decode(data, max_pixels=max_pixels, min_side_px=min_side_px, draft_size=draft_size).image


def draft_scale(size: tuple[int, int], draft_size: tuple[int, int]) -> int:
    """Divisor that `decode` applies to the size of a JPEG: 8, 4, 2 or 1.

    Args:
        size: upright (width, height) as stored, in pixels.
        draft_size: (width, height) that is enough for the caller, as for `decode`.

    Source: Pillow, `JpegImageFile.draft`.
    """
    times = min(
        side // (DRAFT_MARGIN * enough) for side, enough in zip(size, draft_size, strict=True)
    )
    return next((scale for scale in (8, 4, 2) if times >= scale), 1)


def read_size(data: bytes) -> tuple[int, int]:
    """Read the upright (width, height) in pixels from the header, decoding nothing.

    Raises:
        ImageError: with reason `empty`, `not_an_image`, `broken` or `too_large`.
    """
    image = _open(data)
    width, height = image.size
    # Pillow gives the size of a TIFF as it will be once turned.
    turned = image.format != "TIFF" and _orientation(image) >= 5
    return (height, width) if turned else (width, height)


def read_orientation(data: bytes) -> int:
    """Read the EXIF orientation from the header, 1 to 8; 1 is upright.

    Raises:
        ImageError: as for `read_size`.
    """
    return _orientation(_open(data))


def resized_short_side(image: Image.Image, short_side_px: int) -> Image.Image:
    """Shrink a picture so that its short side is at most `short_side_px`; never enlarge it.

    The aspect ratio is kept to within a pixel; the filter is Lanczos, with antialiasing.
    """
    width, height = image.size
    short_px = min(width, height)
    if short_px <= short_side_px:
        return image
    scale = short_side_px / short_px
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _open(data: bytes) -> Image.Image:
    if not data:
        raise ImageError("empty", "the file is empty")
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        if data.startswith(_MAGIC):
            raise ImageError("broken", "the header of the picture cannot be read") from error
        raise ImageError("not_an_image", "not a picture of a known format") from error
    except Exception as error:
        raise _as_image_error(error) from error


def _check_size(image: Image.Image, max_pixels: int, min_side_px: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            "too_large", f"{width} x {height} pixels are more than the allowed {max_pixels}"
        )
    if min(width, height) < min_side_px:
        raise ImageError(
            "too_small", f"{width} x {height} pixels; each side needs at least {min_side_px}"
        )


def _as_image_error(error: Exception) -> ImageError:
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return ImageError("too_large", str(error))
    message = str(error) or type(error).__name__
    if isinstance(error, EOFError) or "truncated" in message.lower():
        return ImageError("truncated", f"the file ends too early: {message}")
    return ImageError("broken", f"the picture cannot be decoded: {message}")


def _orientation(image: Image.Image) -> int:
    """Orientation 1 to 8; 1 where EXIF is absent or damaged, since its pixels are still good."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except MemoryError:
        raise
    except Exception:  # As above: EXIF readers raise nearly anything.
        return 1
    return value if value in _UPRIGHT else 1


def raw_mode(image: Image.Image) -> str:
    """Pixel layout in the file, which tells 16-bit RGB from 8-bit where `mode` does not."""
    if not image.tile:  # type: ignore[attr-defined]
        return ""
    arguments = image.tile[0][3]  # type: ignore[attr-defined]
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_16_bit(image).convert("RGB")
    if image.mode in ("F", "LAB"):
        raise ImageError(
            "unsupported_mode",
            f"pixels of mode {image.mode} have no agreed way to 8-bit RGB",
            hint="convert them to 8 or 16 bits a channel first",
        )
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        canvas = Image.new("RGBA", opaque.size, (*BACKGROUND, 255))
        return Image.alpha_composite(canvas, opaque).convert("RGB")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Map 0..65535 onto 0..255; `convert` would clip everything above 255 to white."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ImageError(
            "unsupported_mode",
            "32-bit integer pixels have no agreed way to 8-bit RGB",
            hint="convert them to 8 or 16 bits a channel first",
        )
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
