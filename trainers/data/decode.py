"""From encoded bytes to an upright 8-bit RGB picture, or an `ImageError` that says why not.

Every picture of the project, whether ingested, trained on or served, goes through `decode`.
"""

from __future__ import annotations

import functools
import io
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from mimray.trainers.data import foreign, gif, png, tiff
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

_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", *tiff.MAGIC)

# Under this share of its range, a picture is nearly of one gray.
_DARK_SHARE = 1 / 16

# What Pillow says of formats it was not built for.
_UNSUPPORTED = re.compile(r"unsupported|not available|not supported|unknown compression", re.I)


@dataclass(frozen=True)
class Reading:
    """A choice of what to take from pictures that hold more than 8-bit RGB.

    Attributes:
        value_range: the values that become black and white in gray of more than 8 bits, and in
            `bands`; None takes the whole range of 16 bits, or the bits that the file calls
            significant.
        bands: numbers, from 1, of the bands of a TIFF that become red, green and blue, or the one
            that becomes gray; None reads TIFFs as RGB or gray.
        page: index of the page of a TIFF; None takes the first that is no overview or mask.
    """

    value_range: tuple[float, float] | None = None
    bands: tuple[int, ...] | None = None
    page: int | None = None


AS_STORED = Reading()


class Note(NamedTuple):
    """A conversion of pixels that loses something: a reason and kind of `Account`."""

    reason: str
    kind: str = ""


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
        notes: conversions that lost something.
    """

    format: str
    mode: str
    width: int
    height: int
    orientation: int
    plain: bool
    notes: tuple[Note, ...] = ()


class Decoded(NamedTuple):
    """A decoded picture and what its file said."""

    image: Image.Image
    header: Header


class PictureFile:
    """An encoded file whose pages are decoded one after another: it is looked through once.

    Args:
        data: the encoded file.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._opened: Image.Image | None = None

    @functools.cached_property
    def pages(self) -> list[tiff.Tags]:
        """The tags of each page of a TIFF; none of other files."""
        return tiff.read_pages(self.data)

    def open(self, page: int | None) -> Image.Image:
        """Open a page, without decoding it; the one before is closed.

        Args:
            page: index of the page, as of `Reading`.

        Raises:
            ImageError: as for `read_size`, or there is no such page.
        """
        if self._opened is None:
            self._opened = _open(self.data)
        index = tiff.first_page(self.data) if page is None else page
        try:
            if index != self._opened.tell():
                self._opened.seek(index)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's readers raise nearly anything on broken bytes.
            raise _as_image_error(error) from error
        return self._opened


def decode(
    data: bytes | PictureFile,
    *,
    max_pixels: int = MAX_PIXELS,
    min_side_px: int = MIN_SIDE_PX,
    max_frames: int | None = None,
    draft_size: tuple[int, int] | None = None,
    reading: Reading = AS_STORED,
) -> Decoded:
    """Decode a whole picture to upright 8-bit RGB.

    Palettes, CMYK (by the plain formula, without its colour profile), alpha (on white), one
    bit and 16 bits a pixel (the full 16-bit range onto 8 bits, unless `reading` or the file says
    otherwise) are converted; of an animation the first frame is taken.

    Args:
        data: the encoded picture, or a file of which each page is decoded once.
        max_pixels: pictures with more pixels are refused from their header, before decoding.
        min_side_px: pictures with a shorter side are refused.
        max_frames: files with more frames or pages are refused.
        draft_size: (width, height) of the upright picture that is enough for the caller; a
            JPEG is then decoded at 1/2, 1/4 or 1/8 where that still covers it twice along each
            side. Others ignore it.
        reading: what to take of pictures that hold more than that.

    Returns:
        The picture, mode RGB, and its header (whose size is the stored one, not the draft's).

    Raises:
        ImageError: with reason `empty`, `not_an_image`, `too_large`, `too_small`, `truncated`,
            `too_many_frames`, `broken`, `unsupported_format` or `unsupported_mode`.
    """
    file = _file_of(data)
    if reading.bands is not None and tiff.is_tiff(file.data):
        return _decode_bands(file, reading, max_pixels, min_side_px)
    image = file.open(reading.page)
    try:
        _check_size(image, max_pixels, min_side_px)
        if max_frames is not None and _has_more_frames(file.data, image, max_frames):
            raise ImageError("too_many_frames", f"more than the allowed {max_frames} frames")
        lost = _lost_bands(image)
        stored_size, mode, layout = image.size, image.mode, raw_mode(image)
        if draft_size is not None and image.format in DRAFTED:
            width, height = draft_size[::-1] if _orientation(image) >= 5 else draft_size
            image.draft(None, (DRAFT_MARGIN * width, DRAFT_MARGIN * height))
        image.load()
        # Only now: a PNG may carry its EXIF behind the pixels, and TIFFs turn while loading.
        orientation = _orientation(image)
        pixels, notes = _to_rgb(image, layout, _value_range(file.data, image, layout, reading))
        if reading.value_range is not None and "16" in layout and mode.startswith("RGB"):
            notes.append(Note("range_unused", str(image.format)))
        notes += lost
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
    header = Header(str(image.format), mode, width, height, orientation, plain, tuple(notes))
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


def count_frames(data: bytes) -> int:
    """Frames of an animation, or pictures of a camera's JPEG; 1 where the header cannot be read."""
    try:
        return int(getattr(_open(data), "n_frames", 1))
    except MemoryError:
        raise
    except Exception:  # What is damaged is told by decoding it.
        return 1


def read_size(data: bytes | PictureFile) -> tuple[int, int]:
    """Read the upright (width, height) in pixels from the header, decoding nothing.

    Raises:
        ImageError: with reason `empty`, `not_an_image`, `broken` or `too_large`.
    """
    image = _file_of(data).open(None)
    width, height = image.size
    # Pillow gives the size of a TIFF as it will be once turned.
    turned = image.format != "TIFF" and _orientation(image) >= 5
    return (height, width) if turned else (width, height)


def read_orientation(data: bytes | PictureFile) -> int:
    """Read the EXIF orientation from the header, 1 to 8; 1 is upright.

    Raises:
        ImageError: as for `read_size`.
    """
    return _orientation(_file_of(data).open(None))


def _file_of(data: bytes | PictureFile) -> PictureFile:
    return data if isinstance(data, PictureFile) else PictureFile(data)


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


def _has_more_frames(data: bytes, image: Image.Image, limit: int) -> bool:
    if image.format == "GIF":
        return gif.has_more_frames(data, limit)
    return bool(getattr(image, "n_frames", 1) > limit)


def _open(data: bytes) -> Image.Image:
    if not data:
        raise ImageError("empty", "the file is empty")
    try:
        return Image.open(io.BytesIO(png.without_metadata(data)), formats=FORMATS)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        _refuse_unsupported(data, error)
        if data.startswith(_MAGIC):
            raise ImageError("broken", "the header of the picture cannot be read") from error
        raise ImageError("not_an_image", "not a picture of a known format") from error
    except Exception as error:
        raise _as_image_error(error) from error


def _refuse_unsupported(data: bytes, error: Exception) -> None:
    """Raise where a file is whole and only of a kind that is not read."""
    if (name := foreign.foreign_format(data)) is not None:
        raise ImageError(
            "unsupported_format", f"{name} is not read", hint="convert it to JPEG, PNG or TIFF"
        ) from error
    tags = next(tiff.iter_pages(data), None)
    if tags is not None and tags.is_whole(len(data)):
        raise _other_bands(tags) from error
    if (mode := foreign.unsupported_jpeg(data)) is not None:
        raise ImageError("unsupported_mode", mode, hint="convert it to 8 bits first") from error


def _lost_bands(image: Image.Image) -> list[Note]:
    """Note the bands that Pillow leaves out beside RGB; refuse to take one of many for gray."""
    if image.format != "TIFF":
        return []
    tags = tiff.Tags.of(image.tag_v2)  # type: ignore[attr-defined]
    num_lost = tags.num_bands - len(image.getbands())
    if num_lost <= 0 or image.mode == "P":
        return []
    if image.mode not in ("RGB", "RGBA"):
        raise _other_bands(tags)
    return [Note("bands_left_out", f"of {tags.num_bands} bands")]


def _other_bands(tags: tiff.Tags) -> ImageError:
    return ImageError(
        "unsupported_mode",
        f"{tags.says()}; three of 8 or 16 bits can be read",
        hint="`mimray data ingest --bands R,G,B` takes the bands of these numbers",
    )


def _decode_bands(
    file: PictureFile, reading: Reading, max_pixels: int, min_side_px: int
) -> Decoded:
    assert reading.bands is not None
    data, pages = file.data, file.pages
    page = tiff.first_page(data) if reading.page is None else reading.page
    if len(pages) <= page or not pages[page].is_whole(len(data)):
        raise ImageError(
            "broken", "the tags of the TIFF are damaged, or what they point to is cut off"
        )
    tags = pages[page]
    _check_sides(tags.size, max_pixels, min_side_px)
    try:
        values = tiff.read_bands(data, tags, reading.bands)
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        raise _as_image_error(error) from error
    bits, notes = max(tags.bits), list[Note]()
    if bits > 8:
        low, high = reading.value_range or (0, 2 ** min(bits, 16) - 1)
        values, notes = _to_8_bits(values, low, high)
    if tags.white_is_zero:
        values = 255 - values
    gray = values.shape[2] == 1
    image = Image.fromarray(np.ascontiguousarray(values[..., 0] if gray else values))
    orientation = tags.orientation if tags.orientation in _UPRIGHT else 1
    if orientation != 1:
        image = image.transpose(_UPRIGHT[orientation])
    header = Header(
        "TIFF", "L" if gray else "RGB", *image.size, orientation, plain=False, notes=tuple(notes)
    )
    return Decoded(image.convert("RGB"), header)


def _check_size(image: Image.Image, max_pixels: int, min_side_px: int) -> None:
    _check_sides(image.size, max_pixels, min_side_px)


def _check_sides(size: tuple[int, int], max_pixels: int, min_side_px: int) -> None:
    width, height = size
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
    if _UNSUPPORTED.search(message):
        return ImageError("unsupported_mode", f"not of a kind that is read: {message}")
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


def _value_range(
    data: bytes, image: Image.Image, layout: str, reading: Reading
) -> tuple[float, float] | None:
    """The values of gray that become black and white; None for the whole range of 16 bits."""
    if reading.value_range is not None:
        return reading.value_range
    if layout == "I;12":
        return 0, 0xFFF
    bits = png.significant_bits(data) if layout.startswith("I;16") else None
    if bits is None or not 8 <= bits < 16:
        return None
    # By the standard, samples are scaled to 16 bits and `sBIT` says what they were before. Many
    # writers do not scale; then no sample has more bits than that.
    values = np.asarray(image)
    scaled = values.max() >= 2**bits or not (values % 2 ** (16 - bits)).any()
    return None if scaled else (0, 2**bits - 1)


def _to_rgb(
    image: Image.Image, layout: str, value_range: tuple[float, float] | None
) -> tuple[Image.Image, list[Note]]:
    if image.mode.startswith("I") or (image.mode == "F" and value_range is not None):
        return _from_deep_gray(image, value_range, layout)
    if image.mode in ("F", "LAB"):
        raise ImageError(
            "unsupported_mode",
            f"pixels of mode {image.mode} have no agreed way to 8-bit RGB",
            hint="convert them to 8 or 16 bits a channel first"
            + (", or give `data ingest --range LOW:HIGH`" if image.mode == "F" else ""),
        )
    notes = [Note("cmyk")] if image.mode == "CMYK" else []
    if "16" in layout:
        notes.append(Note("to_8_bits", "16 bits, colour"))
        colours = np.asarray(image.convert("RGB"))
        if colours.max() < 256 * _DARK_SHARE:
            notes.append(Note("dark", "colour"))
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        if opaque.getchannel("A").getextrema() != (255, 255):
            notes.append(Note("on_white"))
        canvas = Image.new("RGBA", opaque.size, (*BACKGROUND, 255))
        return Image.alpha_composite(canvas, opaque).convert("RGB"), notes
    return image.convert("RGB"), notes


def _from_deep_gray(
    image: Image.Image, value_range: tuple[float, float] | None, layout: str
) -> tuple[Image.Image, list[Note]]:
    """Map gray of more than 8 bits onto 0..255; `convert` would clip values above 255 to white."""
    values = np.asarray(image)
    if value_range is None and (values.min() < 0 or values.max() > 0xFFFF):
        raise ImageError(
            "unsupported_mode",
            "32-bit integer pixels have no agreed way to 8-bit RGB",
            hint="convert them to 8 or 16 bits a channel first, or give `data ingest --range "
            "LOW:HIGH`",
        )
    low, high = value_range or (0, 0xFFFF)
    pixels, notes = _to_8_bits(values, low, high)
    # Pillow turns 8 bits by itself.
    if image.format == "TIFF" and tiff.Tags.of(image.tag_v2).white_is_zero:  # type: ignore[attr-defined]
        pixels = 255 - pixels
    return Image.fromarray(pixels).convert("RGB"), notes


def _to_8_bits(values: np.ndarray, low: float, high: float) -> tuple[np.ndarray, list[Note]]:
    """Map low..high onto 0..255, rounded; what lies outside becomes black or white."""
    first, last = float(values.min()), float(values.max())
    if not (np.isfinite(first) and np.isfinite(last)):
        raise ImageError("unsupported_mode", "some pixels are not finite numbers")
    notes = [Note("to_8_bits", f"{low:g} to {high:g}")]
    if first < low or last > high:
        notes.append(Note("clipped"))
    if last - first < (high - low) * _DARK_SHARE:
        notes.append(Note("dark", _span(first, last)))
    scaled = (np.clip(values, low, high).astype(np.float64) - low) * (255 / (high - low))
    return np.floor(scaled + 0.5).astype(np.uint8), notes


def _span(first: float, last: float) -> str:
    """The range of some bits that holds all values, so that pictures alike count as one kind."""
    if first >= 0:
        return f"values 0:{2 ** int(last).bit_length() - 1}"
    return "values below 0"
