"""Colours and layout of plots, on a light and a dark page alike."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go

from mimray.tuning.record import TrialRecord
from mimray.tuning.report.summary import SweepSummary
from mimray.tuning.report.values import is_number, params_text, score_text, short_names, shown, tick

BLUE, PURPLE, ORANGE, GREY = "#3b7dd8", "#9a6bb0", "#d9772b", "#8a94a3"
INK = "#22272e"
# Of one brightness, so that every line shows on a light and a dark page.
_ENDS = (BLUE, PURPLE, ORANGE)
LINES = [[0, BLUE], [0.5, PURPLE], [1, ORANGE]]
PAIRS = [BLUE, ORANGE, "#3a9d6e", PURPLE, "#c9526b", "#2f9fb3", "#a8842c", GREY]
# The lowest score is close to the page's colour; the highest leaves the text on it readable.
LIGHT = [[0, "#eef3fa"], [1, "#5c98e6"]]
DARK = [[0, "#222c38"], [1, "#2a74cf"]]


def label(value: Any) -> str:
    """A text for a plot, escaped, since plotly reads some HTML."""
    return html.escape(value if isinstance(value, str) else shown(value), quote=False)


def figure(*traces: Any, height: int = 360, **layout: Any) -> go.Figure:
    """A figure in the report's style.

    Args:
        traces: plotly's traces.
        height: the height in pixels.
        **layout: plotly's layout, over the defaults.
    """
    quiet = {"gridcolor": "rgba(138,148,163,0.25)", "zeroline": False, "automargin": True}
    axes = {name: {**quiet, **layout.pop(name, {})} for name in ("xaxis", "yaxis")}
    looks: dict[str, Any] = {
        "template": go.layout.Template(),
        "height": height,
        "margin": {"l": 64, "r": 20, "t": 16, "b": 56},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": GREY},
        "hoverlabel": {"bgcolor": INK, "bordercolor": INK, "font": {"color": "#f4f6f8"}},
        "hovermode": "closest",
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    }
    looks["legend"].update(layout.pop("legend", {}))
    return go.Figure(list(traces), {**looks, **axes, **layout})


def colours(values: Sequence[Any]) -> list[str]:
    """A colour for each value: along a scale for numbers, categorical for others.

    Args:
        values: the distinct values, in order.
    """
    if not all(map(is_number, values)) or len(values) < 2:
        return [PAIRS[i % len(PAIRS)] for i in range(len(values))]
    return [_between(i / (len(values) - 1)) for i in range(len(values))]


def _between(share: float) -> str:
    """The colour at a share of the scale of lines."""
    first, second = _ENDS[:2] if share <= 0.5 else _ENDS[1:]
    part = 2 * share - (share > 0.5)
    ends = [[int(end[i : i + 2], 16) for i in (1, 3, 5)] for end in (first, second)]
    mixed = [round(a + (b - a) * part) for a, b in zip(*ends, strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*mixed)


class Plot(NamedTuple):
    """A figure and its alternative text.

    Attributes:
        name: the plot's name; `plot-<name>` is its id in the page.
        figure: plotly's figure.
        alt: the alternative text, one sentence.
        min_width: the width in pixels below which the plot scrolls.
    """

    name: str
    figure: go.Figure
    alt: str
    min_width: int = 0


def bars(errors: Sequence[float | None]) -> dict[str, Any] | None:
    """Error bars of one standard error to both sides; None where no error is known.

    Args:
        errors: the standard error of each point; None where it is not known.
    """
    if all(error is None for error in errors):
        return None
    return {"type": "data", "array": [error or 0.0 for error in errors], "thickness": 1, "width": 2}


def hover(
    summary: SweepSummary,
    trial: TrialRecord,
    rungs: int,
    score: float,
    standard_error: float | None = None,
) -> str:
    """The text under the pointer at a trial.

    Args:
        summary: the sweep's summary.
        trial: the trial.
        rungs: rungs that the trial had reached.
        score: the score at the last of these.
        standard_error: its standard error; None where it is not known.
    """
    tried = params_text(trial.params, short_names(summary.record.keys)) or "nothing changed"
    shown = score_text(score, standard_error)
    lines = (
        f"trial {trial.number}, {trial.state}",
        tried,
        f"{summary.record.metric} {shown} at rung {rungs} of {summary.rungs}",
    )
    return "<br>".join(map(label, lines))


def ticks(values: Sequence[Any], title: str) -> dict[str, Any]:
    """An axis with a tick for each value, evenly spaced.

    Args:
        values: the distinct values, in order.
        title: the axis's title, escaped.
    """
    return {
        "title": {"text": title},
        "tickvals": list(range(len(values))),
        "ticktext": [label(tick(value)) for value in values],
        "showgrid": False,
        "range": [-0.5, len(values) - 0.5],
    }
