"""The reconstruction sheet and the loss chart of a run.

Arrays come in as uint8 [B, H, W, C] on the host; nothing here knows a tensor or a model.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mimray.trainers.errors import DataError
from mimray.trainers.types import Panel

Pixels = NDArray[np.uint8]
Flags = NDArray[np.bool_]

HIDDEN_GREY = 127
CELL_PX = 192  # the longer side of a shown picture is brought close to this

_MARGIN_PX = 24
_GAP_PX = 10
_HEADING_PX = 17
_CAPTION_PX = 13
_PAPER = (255, 255, 255)
_INK = (38, 42, 48)
_FAINT_INK = (120, 126, 134)

_RAW_BLUE = "#a9c4e6"
_BLUE = "#1f5fae"
_ORANGE = "#c8691c"
_GRID = "#e6e8eb"
_TEXT = "#33383f"


def pixel_mask(mask: Flags, size: tuple[int, int], patch_size: int) -> Flags:
    """Spread a mask over patches onto the pixels they cover.

    Args:
        mask: bool [B, N], True = hidden, row-major over the patch grid.
        size: the pictures' (H, W), pixels.
        patch_size: the side of a square patch, pixels.

    Returns:
        bool [B, H, W], True = hidden.

    Raises:
        DataError: N patches of this size do not tile H x W.
    """
    height, width = size
    rows, columns = height // patch_size, width // patch_size
    if height % patch_size or width % patch_size or mask.shape[1:] != (rows * columns,):
        raise DataError(
            f"a mask of shape {mask.shape} does not fit pictures of {height}x{width} px "
            f"in patches of {patch_size} px",
            hint=f"expected [B, (H / {patch_size}) * (W / {patch_size})]",
        )
    grid = mask.reshape(-1, rows, columns)
    return grid.repeat(patch_size, axis=1).repeat(patch_size, axis=2)


def hide_patches(images: Pixels, mask: Flags, patch_size: int) -> Pixels:
    """Paint the hidden patches mid-grey.

    Args:
        images: uint8 [B, H, W, C].
        mask: bool [B, N], True = hidden.
        patch_size: the side of a square patch, pixels.

    Returns:
        uint8 [B, H, W, C], a new array.
    """
    hidden = pixel_mask(mask, images.shape[1:3], patch_size)[..., None]
    return np.where(hidden, np.uint8(HIDDEN_GREY), images)


def paste_visible(reconstruction: Pixels, original: Pixels, mask: Flags, patch_size: int) -> Pixels:
    """Keep the original where it was visible, the reconstruction where it was hidden.

    Args:
        reconstruction: uint8 [B, H, W, C].
        original: uint8 [B, H, W, C].
        mask: bool [B, N], True = hidden.
        patch_size: the side of a square patch, pixels.

    Returns:
        uint8 [B, H, W, C], a new array.
    """
    hidden = pixel_mask(mask, original.shape[1:3], patch_size)[..., None]
    return np.where(hidden, reconstruction, original)


def panel_sheet(
    panels: Sequence[Panel], *, captions: Sequence[str] | None = None, scale: int | None = None
) -> Image.Image:
    """Lay pictures out: one row a picture, one column a panel, headings on top.

    Args:
        panels: headings and uint8 [B, H, W, C]. One channel is shown as grey; of more than three
            the first three are shown, of two the first. Pictures of another size than the first
            panel's are resized to it.
        captions: one line under each row.
        scale: the enlargement without smoothing, a whole number; by default the one that brings
            the longer side closest to `CELL_PX`, and pictures far larger than that are reduced.

    Returns:
        An RGB picture.

    Raises:
        DataError: shapes or captions do not agree.
    """
    titles = [panel.title for panel in panels]
    columns = [panel.pixels for panel in panels]
    _check_sheet(columns, captions)

    rows, height, width, _ = columns[0].shape
    cell = _cell_size((width, height), scale)
    heading_font = ImageFont.load_default(_HEADING_PX)
    caption_font = ImageFont.load_default(_CAPTION_PX)
    # A column is as wide as its heading, so that none overlap.
    column_width = max(cell[0], *(round(heading_font.getlength(title)) for title in titles))
    caption_height = _CAPTION_PX + 9 if captions else 0
    row_height = cell[1] + caption_height
    top = _MARGIN_PX + _HEADING_PX + 12

    sheet = Image.new(
        "RGB",
        (
            2 * _MARGIN_PX + len(columns) * column_width + (len(columns) - 1) * _GAP_PX,
            top + rows * row_height + (rows - 1) * _GAP_PX + _MARGIN_PX,
        ),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    for column, (title, images) in enumerate(zip(titles, columns, strict=True)):
        x = _MARGIN_PX + column * (column_width + _GAP_PX)
        middle = x + column_width / 2
        draw.text((middle, _MARGIN_PX), title, fill=_INK, font=heading_font, anchor="mt")
        for row, pixels in enumerate(images):
            y = top + row * (row_height + _GAP_PX)
            sheet.paste(_shown(pixels, cell), (x + (column_width - cell[0]) // 2, y))
    for row, caption in enumerate(captions or ()):
        y = top + row * (row_height + _GAP_PX) + cell[1] + 6
        draw.text((_MARGIN_PX, y), caption, fill=_FAINT_INK, font=caption_font)
    return sheet


def png(picture: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def loss_chart(rows: Sequence[Mapping[str, float]], path: Path | str) -> None:
    """Draw loss against step, raw and smoothed, with the learning rate in a thin panel below.

    Args:
        rows: lines of `metrics.jsonl`: `step` and `loss`, and where present `lr` and
            `images_per_s`; rows without a loss are passed over.
        path: the PNG file to write.

    Raises:
        DataError: no row has a loss.
    """
    # Not pyplot, which keeps figures and a backend in global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if "loss" in row]
    if not rows:
        raise DataError(f"no loss to draw in {path}", hint="the run has logged no step yet")
    steps = np.array([row["step"] for row in rows])
    losses = np.array([row["loss"] for row in rows], dtype=np.float64)
    trend = smoothed(losses)

    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))

    # A lone point draws no line, so short runs are dotted.
    dots = "o" if len(rows) < 3 else None
    upper.plot(steps, losses, color=_RAW_BLUE, linewidth=0.9, marker=dots, label="each logged step")
    upper.plot(steps, trend, color=_BLUE, linewidth=2, label="smoothed")
    upper.set_ylabel("loss")
    upper.legend(frameon=False, fontsize=9, labelcolor=_TEXT)
    upper.set_title(_chart_note(rows, trend), loc="left", fontsize=10, color=_TEXT)

    rated = [row for row in rows if "lr" in row]
    lower.plot(
        [row["step"] for row in rated],
        [row["lr"] for row in rated],
        color=_ORANGE,
        linewidth=1.4,
        marker=dots,
    )
    lower.set_ylabel("learning\nrate")
    lower.set_ylim(bottom=0)
    lower.set_xlabel("step")
    lower.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    lower.xaxis.get_major_locator().set_params(integer=True)
    for axes in (upper, lower):
        _quiet(axes)
    figure.align_ylabels()
    figure.savefig(path, format="png")


def probe_chart(
    points: Sequence[tuple[int, float, float | None]], title: str, path: Path | str
) -> None:
    """Draw the scores of a running probe against step, with errors, the best one marked.

    Args:
        points: updates made, score and its standard error, which may be unknown; one at least.
        title: the title of the chart.
        path: the PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, values, known = zip(*points, strict=True)
    best = int(np.argmax(values))
    figure = Figure(figsize=(8, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    errors = [error or 0.0 for error in known]
    axes.errorbar(
        steps, values, yerr=errors if any(errors) else None, color=_BLUE, linewidth=2, marker="o",
        markersize=4, elinewidth=1, capsize=3,
    )  # fmt: skip
    axes.plot(steps[best], values[best], color=_ORANGE, marker="o", markersize=8, linestyle="none")
    axes.set_title(title, loc="left", fontsize=10, color=_TEXT)
    axes.set_xlabel("step")
    axes.locator_params(axis="x", integer=True)
    _quiet(axes)
    figure.savefig(path, format="png")


def smoothed(values: NDArray[np.float64], *, window: int | None = None) -> NDArray[np.float64]:
    """Centred moving average; each end is a straight line fitted to its last window.

    Args:
        values: float64 [T].
        window: the number of values in a point, made odd; about a twentieth of the curve by
            default.

    Returns:
        float64 [T].
    """
    half = (window if window is not None else len(values) // 20) // 2
    half = min(half, (len(values) - 1) // 2)
    if half < 1:
        return values
    width = 2 * half + 1
    middle = np.convolve(values, np.full(width, 1 / width), mode="valid")
    places = np.arange(width)
    head = np.polyval(np.polyfit(places, values[:width], 1), places[:half])
    tail = np.polyval(np.polyfit(places, values[-width:], 1), places[-half:])
    return np.concatenate([head, middle, tail])


def _check_sheet(columns: Sequence[Pixels], captions: Sequence[str] | None) -> None:
    rows = columns[0].shape[0] if columns else 0
    if not rows or any(c.ndim != 4 or c.shape[0] != rows or not c.size for c in columns):
        shapes = ", ".join(str(images.shape) for images in columns)
        raise DataError(f"the columns of a sheet must all be [B, H, W, C] of one B, not {shapes}")
    if captions is not None and len(captions) != rows:
        raise DataError(f"{rows} rows need as many captions, not {len(captions)}")


def _cell_size(size: tuple[int, int], scale: int | None) -> tuple[int, int]:
    """The (width, height) shown: a whole multiple when enlarged, so that pixels stay square."""
    longest = max(size)
    factor: float = scale if scale is not None else max(1, round(CELL_PX / longest))
    if scale is None and longest > 1.5 * CELL_PX:
        factor = CELL_PX / longest
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _shown(pixels: Pixels, size: tuple[int, int]) -> Image.Image:
    """One picture [H, W, C] as RGB at `size` (width, height)."""
    colours = pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., :1].repeat(3, axis=-1)
    image = Image.fromarray(np.ascontiguousarray(colours))
    enlarged = size[0] >= image.width
    return image.resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)


def _chart_note(rows: Sequence[Mapping[str, float]], trend: NDArray[np.float64]) -> str:
    """The curve's ends and the run's speed, in one line."""
    note = f"{rows[-1]['step']:,.0f} steps, loss {trend[0]:.4g} to {trend[-1]:.4g}"
    speeds = [row["images_per_s"] for row in rows if "images_per_s" in row]
    # The median, since the first row includes start-up.
    return f"{note}, {np.median(speeds):,.4g} images/s" if speeds else note


def _quiet(axes: Any) -> None:
    """Remove frames and ticks that carry no data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GRID)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_TEXT, length=0, labelsize=9)
    axes.xaxis.label.set_color(_TEXT)
    axes.yaxis.label.set_color(_TEXT)
