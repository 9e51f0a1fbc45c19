"""Pictures decoded once a node, for all its processes, epochs and trials.

The pixels are those of `decode`, to the bit, so that a cache changes no sample. Damage in rows of a
picture that a crop has no need of goes unnoticed, where rows can be decoded alone.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np

from mimray.trainers.data.arena import Arena, Known, open_arena, picture_bytes, release
from mimray.trainers.data.decode import (
    DRAFTED,
    MAX_PIXELS,
    MIN_SIDE_PX,
    PictureFile,
    decode,
    draft_scale,
    read_orientation,
    read_size,
)
from mimray.trainers.data.jpeg import decode_plain, read_frame
from mimray.trainers.data.resample import Pixels, to_pixels
from mimray.trainers.data.selection import evenly_spread
from mimray.trainers.data.sources import Source
from mimray.trainers.errors import EmptyDatasetError, ImageError

__all__ = ["Picture", "Pictures", "decoded_bytes", "release"]


class Picture:
    """One picture of a source; read when first needed, which may be never.

    Attributes:
        size: upright (width, height) as stored, in pixels.
        label: class of the picture; None where it has none or labels are not asked for.
    """

    def __init__(self, source: Source, index: int, arena: Arena | None, *, label: bool) -> None:
        self._source, self._index, self._arena = source, index, arena
        self._known = arena.known(index) if arena is not None else None
        record = source[index] if label or self._known is None else None
        self._image = record.image if record is not None else None
        self.label = record.label if record is not None and label else None
        self.size = self._file.size if self._known is None else self._known.size

    def decoded(self, enough: tuple[int, int], needed: tuple[int, int] | None = None) -> Pixels:
        """The whole picture, upright RGB: uint8 [H, W, 3].

        Args:
            enough: (width, height) that is enough for the caller, as `draft_size` of `decode`.
            needed: the first row that the caller looks at, and the one behind the last, in pixels
                as stored; others may hold anything. None for all.

        Raises:
            ImageError: it cannot be decoded.
        """
        if self._arena is None:
            return self._file.decoded(enough, needed)[0]
        if self._known is not None:
            kept = self._arena.get(self._index, self._scale(self._known, enough))
            if kept is not None:
                return kept
        pixels, drafts = self._file.decoded(enough)
        known = Known(self.size, drafts)
        scale = self._scale(known, enough)
        # Should a Pillow of another rule come, nothing is kept that is not what it says.
        if not drafts or pixels.shape[1::-1] == tuple(-(-side // scale) for side in self.size):
            self._arena.add(self._index, scale, known, pixels)
        return pixels

    def _scale(self, known: Known, enough: tuple[int, int]) -> int:
        return draft_scale(self.size, enough) if known.drafts else 1

    @functools.cached_property
    def _file(self) -> _File:
        data = self._source[self._index].image if self._image is None else self._image
        return _File(data)


class _File:
    """An encoded picture: its header is read once, and its pixels the fastest way there is.

    Args:
        data: the encoded picture.

    Attributes:
        size: upright (width, height) as stored, in pixels.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._file = PictureFile(data)  # which reads nothing yet
        frame = read_frame(data)
        if frame is not None and (
            not _allowed(frame.size) or (frame.tagged and read_orientation(self._file) != 1)
        ):
            frame = None
        self._frame = frame
        self.size = frame.size if frame is not None else read_size(self._file)

    def decoded(
        self, enough: tuple[int, int], needed: tuple[int, int] | None = None
    ) -> tuple[Pixels, bool]:
        """The pixels, and whether another `enough` may give them at another scale."""
        if self._frame is not None:
            scale = draft_scale(self.size, enough)
            pixels = decode_plain(self._data, self._frame, scale, needed)
            if pixels is not None:
                return pixels, True
        # Once decoded, a file stays at its scale.
        file, self._file = self._file, PictureFile(self._data)
        image, header = decode(file, draft_size=enough)
        return to_pixels(image), header.format in DRAFTED


def _allowed(size: tuple[int, int]) -> bool:
    """True if `decode` does not refuse a picture of this size."""
    return size[0] * size[1] <= MAX_PIXELS and min(size) >= MIN_SIDE_PX


class Pictures:
    """The pictures of a source, by index; can be pickled, as the source can.

    Args:
        source: source of the encoded pictures.
        cache_mib: bound of what is kept decoded on this node; 0 keeps nothing.
        labels: True gives pictures their labels, which have to be read.
    """

    def __init__(self, source: Source, *, cache_mib: int = 0, labels: bool = False) -> None:
        self._source = source
        self._cache_mib = cache_mib
        self._labels = labels
        self._arena: Arena | None = None
        self._opened_by = -1

    def __getitem__(self, index: int) -> Picture:
        """One picture.

        Raises:
            ImageError: its header cannot be read.
        """
        # Locks are of the process that took them: a forked one opens the arena itself.
        if self._cache_mib and self._opened_by != os.getpid():
            facts = self._source.facts
            self._arena = open_arena(facts.fingerprint, facts.num_samples, self._cache_mib)
            self._opened_by = os.getpid()
        return Picture(self._source, index, self._arena, label=self._labels)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arena": None, "_opened_by": -1}


def decoded_bytes(source: Source, sample: int = 64) -> int:
    """Bytes of all pictures of a source when each is kept decoded at its full size.

    JPEGs that are large beside what is asked of them are decoded at a lower scale, and come to
    less; or, where some crops need more than others, to a third more at the very most.

    Args:
        source: the pictures.
        sample: number of headers to read, evenly spread, where the source knows no sizes.

    Raises:
        EmptyDatasetError: of none of those the header can be read.
    """
    known = source.sizes() if hasattr(source, "sizes") else None
    if known is not None:
        return int(picture_bytes(known.clip(0)).sum())  # a size that is missing is -1
    found = []
    for index in evenly_spread(len(source), sample):
        try:
            found.append(read_size(source[int(index)].image))
        except ImageError:
            continue
    if not found:
        raise EmptyDatasetError(f"no header of {source.facts.uri} can be read")
    return int(picture_bytes(np.array(found, dtype=np.int64)).mean() * len(source))
