"""Pictures of the caller, and their forms on the wire."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mimray.serving.wire.codecs import Array, Tensor
from mimray.trainers.errors import ServingError

Image = bytes | str | Path | Array
"""An encoded picture, a path to one (also as str), or uint8 pixels [H, W, C]."""

# Half of what the endpoint reads of one request by default.
MAX_CHUNK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Chunk:
    """Consecutive pictures that fit one tensor: all encoded, or all pixels of one shape.

    Attributes:
        start: index of the first one in the caller's list.
        images: the caller's pictures; files are not read yet.
    """

    start: int
    images: Sequence[Image]

    def tensor(self) -> Tensor:
        """The tensor to send; it reads files."""
        if isinstance(self.images[0], np.ndarray):
            return np.stack([np.asarray(image) for image in self.images])
        return [_encoded(image) for image in self.images]


def chunks(images: Iterable[Image], most: int) -> Iterator[Chunk]:
    """Split pictures, in order, into chunks.

    Args:
        images: the caller's pictures.
        most: most pictures of a chunk.

    Raises:
        ServingError: something that is no picture, or a file that is not there.
    """
    start, found, held = 0, list[Image](), 0
    for index, image in enumerate(images):
        size = _checked_size(image)
        full = len(found) == most or held + size > MAX_CHUNK_BYTES
        if found and (full or _kind(image) != _kind(found[0])):
            yield Chunk(start, found)
            start, found, held = index, [], 0
        found.append(image)
        held += size
    if found:
        yield Chunk(start, found)


def picture_file(image: Image) -> bytes:
    """One picture as a file; pixels become a PPM or, of one channel, a PGM."""
    _checked_size(image)
    if not isinstance(image, np.ndarray):
        return _encoded(image)
    height, width, channels = image.shape
    if channels not in (1, 3):
        raise ServingError(f"pixels of {channels} channels cannot be sent here", hint="send 3 or 1")
    return b"P%d %d %d 255\n" % (6 if channels == 3 else 5, width, height) + image.tobytes()


def _encoded(image: Image) -> bytes:
    if isinstance(image, bytes):
        return image
    assert not isinstance(image, np.ndarray)
    try:
        return Path(image).read_bytes()
    except OSError as error:
        raise ServingError(f"{image} cannot be read: {error.strerror}") from error


def _kind(image: Image) -> tuple[int, ...] | None:
    return image.shape if isinstance(image, np.ndarray) else None


def _checked_size(image: object) -> int:
    """Bytes the picture takes, once it is known to be one."""
    if isinstance(image, bytes):
        return len(image)
    if isinstance(image, str) and image.startswith(("http://", "https://", "data:")):
        raise ServingError(
            f"{image[:60]} is no path",
            hint="fetch the picture and give its bytes; /v1/features takes URLs where configured",
        )
    if isinstance(image, str | Path):
        try:
            return os.stat(image).st_size
        except (OSError, ValueError) as error:
            raise ServingError(f"{str(image)[:200]} cannot be read: {error}") from error
    if not isinstance(image, np.ndarray):
        raise ServingError(
            f"{type(image).__name__} is no picture", hint="give bytes, a path or uint8 [H, W, C]"
        )
    if image.dtype != np.uint8 or image.ndim != 3:
        raise ServingError(
            f"an array of {image.dtype} {list(image.shape)} is no picture",
            hint="give uint8 [H, W, C]",
        )
    return image.nbytes
