"""Charts of scores."""

from __future__ import annotations

import io
from collections.abc import Sequence

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
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
