"""Charts of scores."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

_BAR, _UNTRAINED, _TEXT = "#1f5fae", "#a9b4c0", "#33383f"


def score_chart(names: Sequence[str], values: Sequence[float], title: str) -> bytes:
    """Encoders side by side, a bar each, the best at the top; those untrained in grey.

    Args:
        names: of encoders; those that begin with `untrained:` are what a score must beat.
        values: their headlines.
        title: what was measured.

    Returns:
        A PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    order = sorted(range(len(names)), key=lambda i: values[i])
    figure = Figure(figsize=(8, 0.9 + 0.45 * len(names)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = [_UNTRAINED if names[i].startswith("untrained:") else _BAR for i in order]
    bars = axes.barh([names[i] for i in order], [values[i] for i in order], color=colours)
    axes.bar_label(bars, fmt="%.4f", padding=4, color=_TEXT, fontsize=9)
    axes.set_title(title, loc="left", fontsize=10, color=_TEXT)
    axes.set_xlim(0, max(max(values) * 1.15, 1e-6))
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(colors=_TEXT, length=0, labelsize=9)
    axes.xaxis.set_visible(False)
    return _png(figure)


def confusion_chart(confusion: np.ndarray, class_names: Sequence[str], title: str) -> bytes:
    """What pictures of each class were taken for, as shares of the row.

    Args:
        confusion: int64 [K, K], labels by predictions.
        class_names: by label.
        title: what was measured.

    Returns:
        A PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares = confusion / confusion.sum(axis=1, keepdims=True).clip(1)
    side = min(12.0, 3 + 0.22 * len(class_names))
    figure = Figure(figsize=(side + 1.5, side), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(drawn, ax=axes, shrink=0.6, label="share of the labelled class")
    ticks = range(len(class_names))
    size = 8 if len(class_names) <= 30 else 5
    axes.set_xticks(ticks, class_names, rotation=90, fontsize=size)
    axes.set_yticks(ticks, class_names, fontsize=size)
    axes.set_xlabel("predicted", color=_TEXT)
    axes.set_ylabel("labelled", color=_TEXT)
    axes.set_title(title, loc="left", fontsize=10, color=_TEXT)
    axes.tick_params(colors=_TEXT, length=0)
    return _png(figure)


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
