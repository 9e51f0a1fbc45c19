"""Pages and frames: files that hold several pictures, and which of them are taken."""

from __future__ import annotations

from typing import NamedTuple

from mimray.trainers.data import tiff
from mimray.trainers.data.decode import Note, PictureFile, count_frames


class Pages(NamedTuple):
    """The pages of a file to take.

    Attributes:
        indices: their indices; 0 alone for files that hold one picture.
        notes: what is left out.
    """

    indices: tuple[int, ...]
    notes: tuple[Note, ...]


def choose_pages(data: bytes | PictureFile, *, every_page: bool = False) -> Pages:
    """Choose the pages of a file.

    Pages are those of a TIFF; overviews and masks, which belong to another page, are none. Of an
    animation, and of the several pictures of a camera's JPEG, the first is taken.

    Args:
        data: the encoded file.
        every_page: True takes every page, False the first.
    """
    file = data if isinstance(data, PictureFile) else PictureFile(data)
    if not tiff.is_tiff(file.data):
        num_frames = count_frames(file.data)
        frames = (Note("first_frame", f"{num_frames} frames"),) if num_frames > 1 else ()
        return Pages((0,), frames)
    found = file.pages
    pages = tuple(index for index, tags in enumerate(found) if tags.is_page) or (0,)
    notes: tuple[Note, ...] = (Note("overviews"),) if len(found) > len(pages) else ()
    if every_page:
        return Pages(pages, notes)
    if len(pages) > 1:
        notes += (Note("first_page", f"{len(pages)} pages"),)
    return Pages(pages[:1], notes)
