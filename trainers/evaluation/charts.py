"""Charts of scores, and the colours of classes."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mimray.trainers.evaluation.confusion import confusion_counts
from mimray.trainers.evaluation.uncertainty import figure_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Saturation and brightness of colours, in turn.
_STRENGTHS = ((0.85, 0.95), (0.5, 0.85), (0.9, 0.6))
# Classes that a matrix shows with names one can read.
_MOST_CLASSES, _MOST_SHOWN, _NAME_LENGTH = 40, 30, 24
_BAR, _UNTRAINED, _TEXT = "#1f5fae", "#a9b4c0", "#33383f"
_DOTS = {"untrained": _UNTRAINED, "start": "#86a9d8"}


def score_chart(
    names: Sequence[str],
    values: Sequence[float],
    title: str,
    errors: Sequence[float | None] | None = None,
) -> bytes:
    """Encoders side by side, a bar each, the best at the top, untrained ones in grey.

    Args:
        names: names of the encoders; those that begin with `untrained:` are drawn in grey.
        values: headline score of each encoder.
        title: text above the chart.
        errors: standard error of each score, drawn to both sides; None where it is not known.

    Returns:
        A PNG.
    """
    known = errors or [None] * len(names)
    order = sorted(range(len(names)), key=lambda i: values[i])
    figure = new_figure(8, 0.9 + 0.45 * len(names))
    axes = figure.subplots()
    colours = [_UNTRAINED if names[i].startswith("untrained:") else _BAR for i in order]
    bars = axes.barh([names[i] for i in order], [values[i] for i in order], color=colours)
    for bar, i in zip(bars, order, strict=True):
        middle, error = bar.get_y() + bar.get_height() / 2, known[i]
        if error is not None:
            axes.errorbar(values[i], middle, xerr=error, color=_TEXT, capsize=3, linewidth=1)
        axes.annotate(
            figure_text(values[i], error),
            (values[i] + (error or 0.0), middle),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=_TEXT,
            fontsize=9,
        )
    axes.set_title(title, loc="left", fontsize=10, color=_TEXT)
    furthest = max(value + (error or 0.0) for value, error in zip(values, known, strict=True))
    axes.set_xlim(0, max(furthest * 1.2, 1e-6))
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(colors=_TEXT, length=0, labelsize=9)
    axes.xaxis.set_visible(False)
    return png_of(figure)


class DotRow(NamedTuple):
    """One figure of several encoders.

    Attributes:
        title: name of the figure, and its outcome.
        points: value and bounds of the interval, which may be unknown, by the encoder's name.
    """

    title: str
    points: Mapping[str, tuple[float, tuple[float, float] | None]]


def dot_chart(rows: Sequence[DotRow], title: str) -> bytes:
    """Figures below each other, each on an axis of its own: a dot an encoder, with its interval.

    Args:
        rows: the figures; points of `untrained` are drawn in grey, of `start` paler than others.
        title: text above the chart.

    Returns:
        A PNG.
    """
    figure = new_figure(8, 0.6 + sum(0.75 + 0.28 * len(row.points) for row in rows))
    heights = [1 + 0.6 * len(row.points) for row in rows]
    panels = figure.subplots(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, row in zip(panels, rows, strict=True):
        names = list(row.points)
        for place, (name, (value, interval)) in enumerate(row.points.items()):
            colour = _DOTS.get(name, _BAR)
            if interval is not None:
                axes.plot(interval, (place, place), color=colour, linewidth=2)
            axes.plot(value, place, color=colour, marker="o", markersize=7)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_title(row.title, loc="left", fontsize=9, color=_TEXT)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="x", color="#e6e8eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=_TEXT, length=0, labelsize=8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=_TEXT)
    return png_of(figure)


def confusion_chart(
    labels: np.ndarray, predicted: np.ndarray, class_names: Sequence[str], title: str
) -> bytes:
    """Confusion matrix as a picture, each row in shares of its class.

    Of more than 40 classes it shows the 30 that are confused most often, and what else they are
    taken for in a column of its own.

    Args:
        labels: int64 [N], classes.
        predicted: int64 [N], classes.
        class_names: names of the classes, by label.
        title: text above the chart.

    Returns:
        A PNG.
    """
    shown = np.arange(len(class_names))
    columns = [_short(class_names[k]) for k in shown.tolist()]
    if len(class_names) > _MOST_CLASSES:
        shown = _most_confused(labels, predicted)
        columns = [*(_short(class_names[k]) for k in shown.tolist()), "any other"]
        title = f"{title}\n{len(shown)} of {len(class_names):,} classes: those confused most often"
    rows = columns[: len(shown)]
    place = np.full(len(class_names), len(shown))
    place[shown] = np.arange(len(shown))
    row, column = place[labels], place[predicted]
    inside = row < len(shown)
    pairs = row[inside] * len(columns) + column[inside]
    counts = np.bincount(pairs, minlength=len(rows) * len(columns)).reshape(len(rows), -1)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
    side = min(12.0, 3 + 0.22 * len(rows))
    figure = new_figure(side + 1.5, side)
    axes = figure.subplots()
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(drawn, ax=axes, shrink=0.6, label="share of the labelled class")
    size = 8 if len(rows) <= 30 else 5
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=size)
    axes.set_yticks(range(len(rows)), rows, fontsize=size)
    axes.set_xlabel("predicted", color=_TEXT)
    axes.set_ylabel("labelled", color=_TEXT)
    axes.set_title(title, loc="left", fontsize=10, color=_TEXT)
    axes.tick_params(colors=_TEXT, length=0)
    return png_of(figure)


def _most_confused(labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Classes of the most frequent confusions that are labelled at all, int64, ascending."""
    true, taken_for, _ = confusion_counts(labels, predicted)
    wrong = true != taken_for
    pairs = np.stack([true[wrong], taken_for[wrong]], axis=1).ravel()
    order = np.concatenate([pairs, true])  # where nothing is confused, what occurs most often
    occurring = order[np.isin(order, true)]
    found = list(dict.fromkeys(occurring.tolist()))
    return np.sort(np.array(found[:_MOST_SHOWN], dtype=np.int64))


def _short(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH else f"{name[: _NAME_LENGTH - 1]}…"


def spectrum_chart(values: np.ndarray, title: str) -> bytes:
    """Spectrum of singular values, as shares of the largest, on a logarithmic axis.

    Args:
        values: float [K], not negative, largest first.
        title: text above the chart.

    Returns:
        A PNG.
    """
    shares = values / max(values[0], np.finfo(np.float64).tiny)
    figure = new_figure(6, 3)
    axes = figure.subplots()
    axes.plot(np.arange(1, len(values) + 1), shares.clip(1e-8), color=_BAR, linewidth=1.5)
    axes.set_yscale("log")
    axes.set_ylim(top=1.5)
    axes.set_xlabel("singular value, by rank", color=_TEXT, fontsize=9)
    axes.set_ylabel("share of the largest", color=_TEXT, fontsize=9)
    axes.set_title(title, loc="left", fontsize=10, color=_TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_TEXT, labelsize=9)
    return png_of(figure)


def class_colours(num_classes: int) -> np.ndarray:
    """Colours that differ, uint8 [K, 3]; class 0, often the background, is dark."""
    colours = [(0.22, 0.24, 0.27)]
    for number in range(num_classes - 1):
        # Steps of the golden ratio part the hues; where two come close after all, 5 or 8 steps
        # apart, they differ in strength.
        hue = (0.02 + 0.618034 * number) % 1
        colours.append(colorsys.hsv_to_rgb(hue, *_STRENGTHS[number % len(_STRENGTHS)]))
    return (np.array(colours[:num_classes]) * 255).round().astype(np.uint8)


def new_figure(width_in: float, height_in: float) -> Figure:
    """An empty figure of matplotlib's object-oriented interface.

    pyplot keeps figures and a backend in global state.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png_of(figure: Figure) -> bytes:
    """A figure as PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
