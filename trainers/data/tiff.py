"""TIFF beyond what Pillow reads by itself: what the tags say, pages, and chosen bands."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import COMPRESSION_INFO, ImageFileDirectory_v2, TiffImageFile

from mimray.trainers.errors import ImageError

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 254, 256, 257, 258, 259, 262
_FILL_ORDER, _STRIPS, _ORIENTATION, _SAMPLES, _ROWS, _STRIP_BYTES = 266, 273, 274, 277, 278, 279
_PLANAR, _PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES = 284, 317, 322, 323, 324, 325
_FORMAT = 339
# NewSubfileType: a smaller copy of another page (an overview), or a mask.
_NO_PAGE_OF_ITS_OWN = 1 | 4
# Packed by rules of their own, in which bands are not simply neighbours.
_JPEG_LIKE = frozenset((6, 7, 33003, 33005, 34712, 50001, 50002))
# LZW, Deflate (twice), LZMA and Zstandard. What is packed otherwise has no predictor, whatever its
# tag says. Source: libtiff, the codecs that call `TIFFPredictorInit`.
_PREDICTED = frozenset((5, 8, 32946, 34925, 50000))
# Samples of which bands can be chosen.
_CHOSEN_BITS = (8, 12, 16, 32)
# Bands of a page are unpacked together, then chosen.
MAX_BAND_BYTES = 1 << 30
_READ = frozenset(
    (_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _STRIPS)
    + (_ORIENTATION, _SAMPLES, _ROWS, _STRIP_BYTES, _PLANAR, _PREDICTOR, _TILE_WIDTH)
    + (_TILE_HEIGHT, _TILES, _TILE_BYTES, _FORMAT)
)
_SEVERAL = frozenset((_BITS, _STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES, _FORMAT))
# Pixels are the same without them.
_UNNEEDED = frozenset((_SUBFILE, _ORIENTATION))
_LONG_TAGS = frozenset(
    (_WIDTH, _HEIGHT, _STRIPS, _ROWS, _STRIP_BYTES)
    + (_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES)
)


@dataclass(frozen=True)
class Tags:
    """The tags of one page.

    Attributes:
        values: values by tag: a whole number, or of some tags a tuple of them; none is negative.
        damaged: True if a tag that pixels need holds anything else.
    """

    values: dict[int, Any]
    damaged: bool = False

    @classmethod
    def of(cls, directory: ImageFileDirectory_v2) -> Tags:
        """Those of a directory that Pillow has read."""
        found = {tag: directory[tag] for tag in _READ if tag in directory}
        values = {tag: value for tag, value in found.items() if _is_sound(tag, value)}
        return cls(values, damaged=bool(found.keys() - values.keys() - _UNNEEDED))

    @property
    def size(self) -> tuple[int, int]:
        """Stored (width, height) in pixels."""
        return int(self.values[_WIDTH]), int(self.values[_HEIGHT])

    @property
    def num_bands(self) -> int:
        """Samples of a pixel."""
        return int(self.values.get(_SAMPLES, 1))

    @property
    def bits(self) -> tuple[int, ...]:
        """Bits of each sample."""
        return tuple(map(int, self._several(_BITS, 1)))

    @property
    def orientation(self) -> int:
        """The EXIF orientation, 1 to 8."""
        return int(self.values.get(_ORIENTATION, 1))

    @property
    def white_is_zero(self) -> bool:
        """True if a page of one band is gray of which 0 is white."""
        return self.num_bands == 1 and self.values.get(_PHOTOMETRIC) == 0

    @property
    def is_page(self) -> bool:
        """True unless the page is an overview or a mask of another."""
        return not int(self.values.get(_SUBFILE, 0)) & _NO_PAGE_OF_ITS_OWN

    def says(self) -> str:
        """Bands, bits and packing, for people."""
        bits = ", ".join(map(str, sorted(set(self.bits))))
        kinds = {2: " signed", 3: " floating-point"}
        kind = kinds.get(int(self._several(_FORMAT, 1)[0]), "")
        compression = int(self.values.get(_COMPRESSION, 1))
        packing = "" if compression in COMPRESSION_INFO else f", compression {compression}"
        bands = f"{self.num_bands} band{'s' if self.num_bands > 1 else ''}"
        return f"TIFF of {bands} of {bits}{kind} bits{packing}"

    def is_whole(self, num_bytes: int) -> bool:
        """True if the tags state a picture that lies within the file."""
        keys = self._block_keys
        if self.damaged or not {_WIDTH, _HEIGHT, *keys} <= set(self.values):
            return False
        offsets, counts = (self._several(key, 0) for key in keys)
        return len(offsets) == len(counts) and all(
            offset + count <= num_bytes for offset, count in zip(offsets, counts, strict=True)
        )

    @property
    def _block_keys(self) -> tuple[int, int]:
        return (_TILES, _TILE_BYTES) if _TILES in self.values else (_STRIPS, _STRIP_BYTES)

    def _several(self, tag: int, default: int) -> tuple[Any, ...]:
        value = self.values.get(tag, default)
        return value if isinstance(value, tuple) else (value,)


def _is_sound(tag: int, value: Any) -> bool:
    values = value if tag in _SEVERAL and isinstance(value, tuple) else (value,)
    return bool(values) and all(isinstance(each, int) and each >= 0 for each in values)


def is_tiff(data: bytes) -> bool:
    """True if a file begins as a TIFF does."""
    return data.startswith(MAGIC)


def read_pages(data: bytes) -> list[Tags]:
    """The tags of every page, up to where they are damaged; none of what is not a TIFF."""
    return list(iter_pages(data))


def first_page(data: bytes) -> int:
    """The index of the first page that is no overview or mask of another; 0 where all are."""
    return next((index for index, tags in enumerate(iter_pages(data)) if tags.is_page), 0)


def iter_pages(data: bytes) -> Iterator[Tags]:
    """The tags of one page after another; see `read_pages`."""
    if not is_tiff(data):
        return
    try:
        directory = ImageFileDirectory_v2(data[:16] if data[2] == 43 or data[3] == 43 else data[:8])
        file, seen = io.BytesIO(data), {0}
        while directory.next not in seen:
            seen.add(directory.next)
            file.seek(directory.next)
            directory.load(file)
            yield Tags.of(directory)
    except MemoryError:
        raise
    except Exception:  # Pillow's readers raise nearly anything on broken bytes.
        return


def read_bands(data: bytes, tags: Tags, bands: tuple[int, ...]) -> np.ndarray:
    """Read some bands of a page.

    The bands are read by Pillow as gray pictures, from the same bytes under rewritten tags.

    Args:
        data: the file.
        tags: the tags of the page.
        bands: numbers of the bands, from 1.

    Returns:
        [height, width, len(bands)] of the type the file has.

    Raises:
        ImageError: `unsupported_mode` where there is no such band, or none can be read.
    """
    if max(bands) > tags.num_bands:
        raise ImageError(
            "unsupported_mode",
            f"{tags.says()}; band {max(bands)} was asked for",
            hint="see --bands",
        )
    compression = int(tags.values.get(_COMPRESSION, 1))
    if compression in _JPEG_LIKE or len(set(tags.bits)) > 1 or tags.bits[0] not in _CHOSEN_BITS:
        raise ImageError("unsupported_mode", f"{tags.says()}, packed so that no band can be chosen")
    if data[2] == 43 or data[3] == 43:
        raise ImageError("unsupported_mode", f"{tags.says()} in BigTIFF, of which no band is read")
    separate = tags.values.get(_PLANAR, 1) == 2 or tags.num_bands == 1
    _check_bytes(tags, len(bands) if separate else tags.num_bands)
    if separate:
        return np.stack([_plane(data, tags, band - 1) for band in bands], axis=2)
    return _interleaved(data, tags)[..., [band - 1 for band in bands]]


def _check_bytes(tags: Tags, num_bands: int) -> None:
    (width, height), bits = tags.size, tags.bits[0]
    num_bytes = width * height * num_bands * -(-bits // 8)
    if num_bytes > MAX_BAND_BYTES:
        raise ImageError(
            "too_large",
            f"{width} x {height} pixels of {num_bands} bands of {bits} bits take "
            f"{num_bytes / 2**30:.1f} GiB, more than {MAX_BAND_BYTES / 2**30:g} GiB",
            hint="cut the picture into smaller ones",
        )


def _plane(data: bytes, tags: Tags, band: int) -> np.ndarray:
    values = _gray(tags)
    for key in tags._block_keys:
        blocks = tags._several(key, 0)
        per_band = len(blocks) // tags.num_bands
        values[key] = blocks[band * per_band : (band + 1) * per_band]
    return _decoded(data, values, tags._block_keys)


def _interleaved(data: bytes, tags: Tags) -> np.ndarray:
    (width, height), num_bands = tags.size, tags.num_bands
    values = _gray(tags)
    values[_WIDTH] = width * num_bands
    block = width
    if _TILE_WIDTH in values:
        block = int(values[_TILE_WIDTH])
        values[_TILE_WIDTH] = block * num_bands
    for key in tags._block_keys:
        values[key] = tags._several(key, 0)
    # Differences are between pixels, which a gray picture of all bands does not have.
    predictor = int(values.pop(_PREDICTOR, 1))
    pixels = _decoded(data, values, tags._block_keys).reshape(height, width, num_bands)
    if predictor == 2:
        pixels = pixels.copy()
        for left in range(0, width, block):
            part = pixels[:, left : left + block]
            np.cumsum(part, axis=1, dtype=part.dtype, out=part)
    elif predictor != 1:
        raise ImageError("unsupported_mode", f"{tags.says()}, predictor {predictor}")
    return pixels


def _gray(tags: Tags) -> dict[int, Any]:
    kept = [_WIDTH, _HEIGHT, _COMPRESSION, _FILL_ORDER, _ROWS, _TILE_WIDTH, _TILE_HEIGHT]
    if tags.values.get(_COMPRESSION, 1) in _PREDICTED:
        kept.append(_PREDICTOR)
    values = {key: tags.values[key] for key in kept if key in tags.values}
    return values | {
        _BITS: tags.bits[0],
        _PHOTOMETRIC: 1,
        _SAMPLES: 1,
        _FORMAT: tags._several(_FORMAT, 1)[0],
    }


class _Bands(TiffImageFile):
    """A TIFF that `_check_bytes` allows; its bands side by side may be more than Pillow does."""

    def load_prepare(self) -> None:
        if self._im is None:
            # What Pillow does itself, less its limit on pixels, of which bands are no more.
            self.im = Image.core.new(self.mode, self._tile_size)  # type: ignore[attr-defined]
        super().load_prepare()


def _decoded(data: bytes, values: dict[int, Any], keys: tuple[int, int]) -> np.ndarray:
    """Decode blocks of a file, of which nothing else is copied, under other tags."""
    offsets, counts = (values[key] for key in keys)
    if sum(counts) > len(data):
        raise ImageError("broken", "blocks of the TIFF lie over one another")
    blocks = [data[start : start + count] for start, count in zip(offsets, counts, strict=True)]
    starts = np.cumsum([8, *counts])[:-1].tolist()
    alone = b"".join((data[:4], bytes(4), *blocks))
    with _Bands(io.BytesIO(_with_tags(alone, values | {keys[0]: tuple(starts)}))) as image:
        return np.asarray(image)


def _with_tags(data: bytes, values: dict[int, Any]) -> bytes:
    """A TIFF of the same bytes, read under other tags, which are appended."""
    order = "<" if data.startswith(b"II") else ">"
    start = len(data) + len(data) % 2
    tail = start + 2 + 12 * len(values) + 4
    entries, extra = b"", b""
    for tag, value in sorted(values.items()):
        numbers = [int(v) for v in (value if isinstance(value, tuple) else (value,))]
        code, letter = (4, "I") if tag in _LONG_TAGS else (3, "H")
        packed = struct.pack(f"{order}{len(numbers)}{letter}", *numbers)
        if len(packed) > 4:
            packed, extra = struct.pack(f"{order}I", tail + len(extra)), extra + packed
        entries += struct.pack(f"{order}HHI", tag, code, len(numbers)) + packed.ljust(4, b"\0")
    directory = struct.pack(f"{order}H", len(values)) + entries + struct.pack(f"{order}I", 0)
    header = data[:4] + struct.pack(f"{order}I", start)
    return header + data[8:].ljust(start - 8, b"\0") + directory + extra
