"""Pictures of a segmentation for people."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mimray.trainers.evaluation.charts import class_colours, new_figure, png_of
from mimray.trainers.pictures import panel_sheet
from mimray.trainers.types import Panel

_VOID = (255, 255, 255)
_RIGHT, _WRONG = (226, 230, 234), (200, 60, 40)
# How strongly a label covers the picture.
_OPACITY = 0.65
_SHOWN_PX = 256
_SWATCH_PX, _FONT_PX, _MARGIN_PX = 14, 13, 24
_BLUE, _TEXT, _GRID = "#1f5fae", "#33383f", "#e6e8eb"


class Shown(NamedTuple):
    """A picture to show.

    Attributes:
        image: uint8 [h, w, 3].
        labels: int64 [h, w].
        void: bool [h, w], labels that say nothing.
        predicted: int64 [h, w].
    """

    image: np.ndarray
    labels: np.ndarray
    void: np.ndarray
    predicted: np.ndarray


def sheet(shown: Sequence[Shown], class_names: Sequence[str]) -> bytes:
    """Rows of picture, labels, prediction and errors, and a legend below; a PNG.

    Void is white and counts as no error.
    """
    colours = class_colours(len(class_names))
    columns: dict[str, list[np.ndarray]] = {
        "picture": [],
        "labels": [],
        "prediction": [],
        "errors": [],
    }
    height, width = shown[0].image.shape[:2]
    factor = min(1.0, _SHOWN_PX / max(height, width))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    for image, labels, void, predicted in shown:
        painted = colours[np.where(void, 0, labels)]
        wrong = np.where((labels != predicted)[..., None], _WRONG, _RIGHT)
        for title, pixels in {
            "picture": image,
            "labels": np.where(void[..., None], _VOID, _over(image, painted)),
            "prediction": _over(image, colours[predicted]),
            "errors": np.where(void[..., None], _VOID, wrong),
        }.items():
            one = Image.fromarray(pixels.astype(np.uint8)).resize(size, Image.Resampling.BOX)
            columns[title].append(np.asarray(one))
    table = panel_sheet([Panel(title, np.stack(column)) for title, column in columns.items()])
    seen = np.unique(
        np.concatenate([np.append(one.labels[~one.void], one.predicted) for one in shown])
    )
    legend = _legend([(class_names[k], colours[k]) for k in seen.tolist()], table.width)
    whole = Image.new("RGB", (table.width, table.height + legend.height), "white")
    whole.paste(table, (0, 0))
    whole.paste(legend, (0, table.height))
    file = io.BytesIO()
    whole.save(file, format="png")
    return file.getvalue()


def class_chart(iou: Mapping[str, float | None], rows: Sequence[Mapping[str, float]] = ()) -> bytes:
    """IoU by class, best first, and beside it the loss by epoch; a PNG.

    Args:
        iou: IoU by class name; None where it is neither labelled nor predicted.
        rows: rows of the training, with `epoch` and `cross_entropy`; none where none took place.
    """
    figure = new_figure(10, max(3.2, 0.9 + 0.26 * len(iou)))
    if not rows:
        _plot_iou(figure.subplots(), iou)
        return png_of(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _plot_iou(left, iou)
    right.plot(
        [row["epoch"] for row in rows],
        [row["cross_entropy"] for row in rows],
        color=_BLUE,
        marker="o",
        markersize=3,
    )
    right.set_title("loss", loc="left", fontsize=10, color=_TEXT)
    right.set_xlabel("epoch", color=_TEXT)
    right.xaxis.get_major_locator().set_params(integer=True)
    right.grid(axis="y", color=_GRID)
    _plain(right)
    return png_of(figure)


def _plot_iou(axes: Any, iou: Mapping[str, float | None]) -> None:
    ranked = sorted(iou.items(), key=lambda item: -1.0 if item[1] is None else item[1])
    bars = axes.barh(
        [name for name, _ in ranked], [value or 0.0 for _, value in ranked], color=_BLUE
    )
    marks = ["absent" if value is None else f"{value:.3f}" for _, value in ranked]
    axes.bar_label(bars, marks, padding=4, color=_TEXT, fontsize=8)
    axes.set_xlim(0, 1.12)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_title("IoU by class", loc="left", fontsize=10, color=_TEXT)
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GRID)
    axes.tick_params(colors=_TEXT, length=0, labelsize=9)


def _over(image: np.ndarray, painted: np.ndarray) -> np.ndarray:
    grey = image.mean(axis=-1, keepdims=True)
    mixed: np.ndarray = (1 - _OPACITY) * grey + _OPACITY * painted
    return mixed


def _legend(entries: Sequence[tuple[str, np.ndarray]], width: int) -> Image.Image:
    """Coloured squares with names, in as many lines as they need."""
    font = ImageFont.load_default(_FONT_PX)
    places, x, y = [], _MARGIN_PX, 0
    for name, _ in entries:
        wide = _SWATCH_PX + 6 + round(font.getlength(name)) + 18
        if x > _MARGIN_PX and x + wide > width - _MARGIN_PX:
            x, y = _MARGIN_PX, y + _SWATCH_PX + 8
        places.append((x, y))
        x += wide
    legend = Image.new("RGB", (width, y + _SWATCH_PX + _MARGIN_PX), "white")
    draw = ImageDraw.Draw(legend)
    for (name, colour), (x, y) in zip(entries, places, strict=True):
        draw.rectangle((x, y, x + _SWATCH_PX, y + _SWATCH_PX), fill=tuple(colour.tolist()))
        draw.text((x + _SWATCH_PX + 6, y), name, fill=(38, 42, 48), font=font)
    return legend
