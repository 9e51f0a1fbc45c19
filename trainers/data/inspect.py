"""Measurements of a dataset: number, sizes and classes of its pictures, and a contact sheet."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from mimray.trainers.data.account import Account
from mimray.trainers.data.decode import decode, decode_rgb
from mimray.trainers.data.pages import choose_pages
from mimray.trainers.data.parquet import ParquetSource
from mimray.trainers.data.rng import Stream, generator, permutation
from mimray.trainers.data.sources import Source, available_splits, open_source
from mimray.trainers.errors import ImageError
from mimray.trainers.types import DatasetFacts

_SAMPLE = 64
# Rows of a large batch, where labels are held against those of as many rows in turn.
_STRETCH_ROWS = 1024
# Rows in random order hardly ever have fewer classes than this share of what is expected.
_MIXED = 0.8
_MIN_ROWS = 16
_COLUMNS = 8
_TILE_PX = 144
_GAP_PX = 10
_TITLE_PX = 44
_CAPTION_PX = 20
_PAPER, _INK, _FAINT = "#ffffff", "#1c1e21", "#8a9099"


@dataclass(frozen=True)
class Range:
    """Smallest, median and largest of a length in pixels."""

    smallest: int
    median: int
    largest: int


@dataclass(frozen=True)
class LabelMixing:
    """Classes that rows in turn have, against those of rows in random order.

    Attributes:
        stretch_rows: rows in turn that are looked at together.
        classes: mean number of classes in such a stretch, in the order of the files.
        shuffled_classes: the same with all rows in random order.
        in_runs: True if there are so few classes that rows must be sorted by class.
    """

    stretch_rows: int
    classes: float
    shuffled_classes: float
    in_runs: bool


@dataclass(frozen=True)
class Inspection:
    """Measurements of a dataset.

    Attributes:
        facts: facts of the dataset.
        splits: names of the splits at that URI.
        num_bytes: size of its files.
        num_groups: row groups (pictures, for a plain folder).
        width: widths of the pictures measured; None when none could be.
        height: heights of the pictures measured, likewise.
        num_measured: pictures that width and height were taken from.
        num_broken: pictures of the sample that cannot be used.
        label_counts: pictures a class, by name (or number where names are unknown); None when
            unlabelled.
        label_notes: what people need to know of the labels: columns that were not taken, pictures
            without a label, names that are easily mistaken.
        label_mixing: how well classes are mixed in Parquet; None when unlabelled or of a few
            rows, and for a folder, whose files are read in any order.
        account: what was passed over or merged in finding the files.
        looked_at: what is lost of the pictures measured, and why others cannot be used: the same
            words as those of an ingest.
        broken: pictures of the sample that cannot be used, by reason.
    """

    facts: DatasetFacts
    splits: tuple[str, ...]
    num_bytes: int
    num_groups: int
    width: Range | None
    height: Range | None
    num_measured: int
    num_broken: int
    label_counts: dict[str, int] | None
    label_notes: tuple[str, ...]
    label_mixing: LabelMixing | None
    account: Account
    looked_at: Account
    broken: dict[str, int]


def inspect(
    uri: str,
    *,
    contact_sheet: Path | None = None,
    split: str | None = None,
    label: str | None = None,
) -> Inspection:
    """Measure a dataset, and draw some of its pictures.

    Widths and heights are those of all pictures where the data has them as columns, as ingested
    data does; otherwise those of up to 64 evenly spaced pictures.

    Args:
        uri: place of the dataset, as for `open_source`.
        contact_sheet: PNG file to write with up to 64 evenly spaced pictures.
        split: split to look at, as for `open_source`.
        label: column of the labels, as for `open_source`.

    Raises:
        DataError: as `open_source`.
    """
    source = open_source(uri, split=split, label=label)
    sample = np.linspace(0, len(source) - 1, min(_SAMPLE, len(source))).round().astype(int)
    sizes = source.sizes() if isinstance(source, ParquetSource) else None
    broken: Counter[str] = Counter()
    looked_at = Account()
    if sizes is None:
        measured = []
        for index in sample:
            try:
                measured.append(_measured(source[int(index)].image, looked_at))
            except ImageError as error:
                broken[error.reason] += 1
        sizes = np.array(measured, dtype=np.int64).reshape(-1, 2)
    if contact_sheet is not None:
        draw_contact_sheet(source, [int(i) for i in sample]).save(contact_sheet)
    looked_at.drop_few_dark()
    return Inspection(
        facts=source.facts,
        splits=available_splits(uri),
        num_bytes=source.num_bytes,
        num_groups=len(source.group_rows),
        width=_range(sizes[:, 0]),
        height=_range(sizes[:, 1]),
        num_measured=len(sizes),
        num_broken=broken.total(),
        label_counts=_label_counts(source),
        label_notes=source.label_notes,
        label_mixing=_label_mixing(source),
        account=source.account,
        looked_at=looked_at,
        broken=dict(broken.most_common()),
    )


def _measured(data: bytes, account: Account) -> tuple[int, int]:
    """The size of a picture, which is decoded to count what is lost of it."""
    header = decode(data, draft_size=(1, 1)).header
    for note in (*choose_pages(data).notes, *header.notes):
        account.add(*note)
    return header.width, header.height


def draw_contact_sheet(source: Source, indices: list[int]) -> Image.Image:
    """Draw pictures in a grid, cropped to squares, with their classes beneath when labelled."""
    names = source.facts.class_names
    labelled = source.labels() is not None
    columns = min(_COLUMNS, len(indices))
    rows = -(-len(indices) // columns)
    step_x = _TILE_PX + _GAP_PX
    step_y = step_x + (_CAPTION_PX if labelled else 0)
    title = f"{len(source):,} pictures"
    place = source.facts.uri
    width = max(columns * step_x + _GAP_PX, 3 * step_x + _GAP_PX)
    sheet = Image.new("RGB", (width, _TITLE_PX + rows * step_y + _GAP_PX), _PAPER)
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(20), ImageFont.load_default(13)
    draw.text((_GAP_PX, _TITLE_PX / 2), title, _INK, large, anchor="lm")
    left = _GAP_PX + draw.textlength(title, large) + 2 * _GAP_PX
    place = _shortened(draw, place, small, sheet.width - left - _GAP_PX, keep_end=True)
    draw.text((sheet.width - _GAP_PX, _TITLE_PX / 2), place, _FAINT, small, anchor="rm")
    for number, index in enumerate(indices):
        x = _GAP_PX + number % columns * step_x
        y = _TITLE_PX + number // columns * step_y
        record = source[index]
        sheet.paste(_tile(record.image, small), (x, y))
        if labelled and record.label is not None:
            known = 0 <= record.label < len(names)
            caption = names[record.label] if known else f"class {record.label}"
            caption = _shortened(draw, caption, small, _TILE_PX)
            draw.text((x, y + _TILE_PX + 4), caption, _INK, small)
    return sheet


def _tile(data: bytes, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Image.Image:
    size = (_TILE_PX, _TILE_PX)
    try:
        image = decode_rgb(data, draft_size=size)
    except ImageError as error:
        tile = Image.new("RGB", size, "#eceef1")
        ImageDraw.Draw(tile).text(
            (_TILE_PX / 2, _TILE_PX / 2), error.reason, _FAINT, font, anchor="mm"
        )
        return tile
    # Tiny pictures are shown with their pixels, not blurred.
    small = min(image.size) * 3 <= _TILE_PX
    resample = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return ImageOps.fit(image, size, resample)


def _shortened(
    draw: ImageDraw.ImageDraw,
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    width_px: float,
    *,
    keep_end: bool = False,
) -> str:
    """Cut a text to a width, marking the cut."""
    if draw.textlength(text, font) <= width_px:
        return text
    while text and draw.textlength(f"{text}...", font) > width_px:
        text = text[1:] if keep_end else text[:-1]
    return f"...{text}" if keep_end else f"{text}..."


def _range(values: np.ndarray) -> Range | None:
    if not len(values):
        return None
    return Range(int(values.min()), int(np.median(values)), int(values.max()))


def _label_counts(source: Source) -> dict[str, int] | None:
    labels = source.labels()
    if labels is None:
        return None
    names = source.facts.class_names
    numbers, counts = np.unique(labels[labels >= 0], return_counts=True)
    return {
        names[n] if 0 <= n < len(names) else str(n): int(count)
        for n, count in zip(numbers.tolist(), counts, strict=True)
    }


def _label_mixing(source: Source) -> LabelMixing | None:
    labels = source.labels() if isinstance(source, ParquetSource) else None
    if labels is None or len(labels) < _MIN_ROWS:
        return None
    stretch_rows = min(_STRETCH_ROWS, len(labels) // 4)
    shuffled = labels[permutation(generator(0, Stream.WINDOW_ORDER, 0), len(labels))]
    classes, expected = (_classes_a_stretch(order, stretch_rows) for order in (labels, shuffled))
    return LabelMixing(stretch_rows, classes, expected, in_runs=classes < _MIXED * expected)


def _classes_a_stretch(labels: np.ndarray, rows: int) -> float:
    whole = labels[: len(labels) // rows * rows].reshape(-1, rows)
    return float((np.diff(np.sort(whole, axis=1), axis=1) != 0).sum(axis=1).mean()) + 1
