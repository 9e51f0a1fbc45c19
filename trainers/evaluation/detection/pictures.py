"""Pictures of detections, and charts of losses and precision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mimray.trainers.evaluation.charts import class_colours, new_figure, png_of
from mimray.trainers.evaluation.detection.detector import Detections
from mimray.trainers.evaluation.detection.metrics import Figures, GroundTruth

_CELL_IN = 4.2
# A class that many does not get a line of its own.
_MOST_CURVES = 12
_MASK_ALPHA = 0.35
# Height of a label over the picture's.
_LABEL_SHARE = 0.04
_TEXT, _GRID = "#33383f", "#e6e8eb"


def draw_found(
    pictures: Sequence[Image.Image],
    found: Sequence[Detections],
    truths: Sequence[GroundTruth],
    class_names: Sequence[str],
    shown_score: float,
) -> bytes:
    """Draw detections in solid lines with class and score, labelled objects in dashed ones.

    Args:
        pictures: upright, RGB.
        found: objects found on each picture; those that score lower than `shown_score` are left
            out.
        truths: labelled objects of each picture, crowds dotted; empty for pictures without labels.
        class_names: names of the classes, by label.
        shown_score: lowest score that is drawn, in [0, 1].

    Returns:
        A PNG.
    """
    from matplotlib.lines import Line2D

    columns = math.ceil(math.sqrt(len(pictures)))
    rows = -(-len(pictures) // columns)
    tallest = max(picture.height / picture.width for picture in pictures)
    figure = new_figure(columns * _CELL_IN, rows * _CELL_IN * tallest + 0.6)
    cells = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axes in cells:
        axes.set_axis_off()
    colours = _colours(len(class_names))
    for number, (picture, objects) in enumerate(zip(pictures, found, strict=True)):
        axes = cells[number]
        axes.imshow(np.asarray(picture), aspect="equal")
        for truth in truths[number : number + 1]:
            for box, label, crowd in zip(truth.boxes, truth.labels, truth.crowd, strict=True):
                _draw_box(axes, box, colours[label], ":" if crowd else "--")
        shown = np.flatnonzero(objects.scores >= shown_score)[::-1]  # the best on top
        if objects.masks is not None:
            for i in shown:
                _draw_mask(axes, objects.masks[i], colours[objects.labels[i]])
        for i in shown:
            colour = colours[objects.labels[i]]
            _draw_box(axes, objects.boxes[i], colour, "-")
            text = f"{class_names[objects.labels[i]]} {objects.scores[i]:.2f}"
            _draw_label(axes, objects.boxes[i], text, colour)
    handles = [
        *(
            Line2D([], [], color=colours[label], linewidth=3, label=class_names[label])
            for label in _present(found, truths)[:_MOST_CURVES]
        ),
        Line2D([], [], color=_TEXT, label=f"found, score {shown_score:g} or more"),
    ]
    if truths:
        handles.append(Line2D([], [], color=_TEXT, linestyle="--", label="labelled"))
    figure.legend(
        handles=handles,
        loc="outside lower left",
        ncols=6,
        frameon=False,
        fontsize=9,
        labelcolor=_TEXT,
    )
    return png_of(figure)


def draw_curves(
    rows: Sequence[Mapping[str, float]], figures: Figures, class_names: Sequence[str]
) -> bytes:
    """Draw the losses by epoch, and precision over recall at IoU .50 for each class.

    Args:
        rows: the rows that `train_head` returned.
        figures: figures by boxes.
        class_names: names of the classes, by label.

    Returns:
        A PNG.
    """
    figure = new_figure(11, 4.4)
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    parts = [name for name in rows[-1] if name not in ("epoch", "lr")]
    total = [sum(row[name] for name in parts) for row in rows]
    dots = "o" if len(rows) < 3 else None  # a lone point draws no line
    left.plot(epochs, total, color=_TEXT, linewidth=2, marker=dots, label="all")
    for name in parts:
        values = [row[name] for row in rows]
        left.plot(epochs, values, linewidth=1.2, marker=dots, label=name.removeprefix("loss_"))
    left.set_xlabel("epoch")
    left.set_ylim(bottom=0)
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_title("training losses", loc="left", fontsize=10, color=_TEXT)
    recalls = np.linspace(0, 1, figures.curves.shape[1])
    measured = np.flatnonzero(~np.isnan(figures.curves).any(axis=1))
    colours = _colours(len(class_names))
    for label in measured[:_MOST_CURVES]:
        name = class_names[label]
        score = figures.per_class[name]["AP50"]
        text = f"{name}  {score:.3f}"
        right.plot(recalls, figures.curves[label], color=colours[label], linewidth=1.6, label=text)
    right.set_xlabel("recall")
    right.set_ylabel("precision")
    right.set_xlim(0, 1)
    right.set_ylim(0, 1.02)
    right.set_title("AP50 by class", loc="left", fontsize=10, color=_TEXT)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_GRID)
        axes.grid(color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=_TEXT, length=0, labelsize=9)
        axes.legend(frameon=False, fontsize=9, labelcolor=_TEXT)
    return png_of(figure)


def _present(found: Sequence[Detections], truths: Sequence[GroundTruth]) -> list[int]:
    labels = [objects.labels for objects in found] + [truth.labels for truth in truths]
    return [int(label) for label in np.unique(np.concatenate(labels))]


def _draw_box(axes: Any, box: np.ndarray, colour: Any, style: str) -> None:
    from matplotlib.patches import Rectangle

    left, top, right, bottom = box - 0.5  # matplotlib puts the centre of the first pixel at 0
    axes.add_patch(
        Rectangle(
            (left, top),
            right - left,
            bottom - top,
            fill=False,
            edgecolor=colour,
            linestyle=style,
            linewidth=1.6 if style == "-" else 1.2,
        )
    )


def _draw_label(axes: Any, box: np.ndarray, text: str, colour: Any) -> None:
    left, top = box[:2]
    axes.text(
        left,
        top,
        text,
        fontsize=6.5,
        color="white",
        # Inside of the box where there is no room above it.
        va="bottom" if top > _LABEL_SHARE * axes.get_ylim()[0] else "top",
        clip_on=True,
        bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
    )


def _draw_mask(axes: Any, run_lengths: dict[str, Any], colour: Any) -> None:
    from faster_coco_eval.core import mask as mask_api

    mask = mask_api.decode(run_lengths).astype(bool)
    layer = np.zeros((*mask.shape, 4))
    layer[mask] = (*colour[:3], _MASK_ALPHA)
    axes.imshow(layer)


def _colours(count: int) -> list[tuple[float, float, float, float]]:
    """A colour a class, opaque."""
    found = class_colours(count + 1)[1:] / 255
    return [(*colour, 1.0) for colour in found.tolist()]
