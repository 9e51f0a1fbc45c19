"""Plots of scores: over two keys, against cost, along the training.

Text in plots is escaped, since plotly reads HTML.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from mimray.tuning.record import TrialRecord
from mimray.tuning.report.summary import Point, SweepSummary, is_logarithmic, values_of
from mimray.tuning.report.tables import cell_text
from mimray.tuning.report.theme import (
    BLUE,
    DARK,
    GREY,
    LIGHT,
    ORANGE,
    Plot,
    bars,
    colours,
    figure,
    hover,
    label,
    ticks,
)
from mimray.tuning.report.values import distinct, frozen, is_number, short_names, shown

_LEGEND_ENTRIES = 10
_CURVE_POINTS = 200
_FEW = 8

# A trial, pictures seen, the values drawn, texts under the pointer, error bars.
Line = tuple[
    TrialRecord, Sequence[float], Sequence[float], Sequence[str] | str, dict[str, Any] | None
]


def heatmap(summary: SweepSummary) -> Plot | None:
    """Heatmap of scores over two keys; squares of unfinished trials show the rung reached.

    Args:
        summary: the sweep's summary.
    """
    chart = summary.heatmap
    if chart is None or not summary.ranked:
        return None
    names = short_names(chart.keys)
    across, down = (names[key] for key in chart.keys)
    trace = go.Heatmap(
        z=[[None if c is None else c.score for c in row] for row in chart.cells],
        x=list(range(len(chart.columns))),
        y=list(range(len(chart.rows))),
        text=[[cell_text(c, chart.rungs, gap="<br>") for c in row] for row in chart.cells],
        texttemplate="%{text}",
        textfont={"size": 13 if len(chart.columns) <= _FEW else 10},
        hovertext=[
            [
                hover(summary, summary.trial(c.trial), c.rungs, c.score, c.standard_error)
                if c
                else ""
                for c in row
            ]
            for row in chart.cells
        ],
        hoverinfo="text",
        hoverongaps=False,
        xgap=3,
        ygap=3,
        colorscale=LIGHT,
        colorbar={
            "title": {"text": label(summary.record.metric)},
            "thickness": 12,
            "outlinewidth": 0,
        },
        meta={"dark": DARK},
    )
    made = figure(
        trace,
        height=max(240, 110 + 52 * len(chart.rows)),
        xaxis=ticks(chart.columns, label(across)),
        yaxis=ticks(chart.rows, label(down)),
    )
    best = summary.ranked[0].number
    for y, row in enumerate(chart.cells):
        for x, cell in enumerate(row):
            if cell is not None and cell.trial == best:
                box = {"x0": x - 0.47, "x1": x + 0.47, "y0": y - 0.45, "y1": y + 0.45}
                made.add_shape(type="rect", line={"color": ORANGE, "width": 3}, **box)
    metric = summary.record.metric
    alt = f"Heatmap of {metric} by {across} and {down}; the table below has the figures."
    return Plot("heatmap", made, alt, 84 + 42 * len(chart.columns))


def slices(summary: SweepSummary) -> list[Plot]:
    """Score against the first keys one by one, where there is no heatmap.

    Args:
        summary: the sweep's summary.
    """
    if summary.heatmap is not None or not summary.ranked:
        return []
    return [_slice(summary, number) for number in range(min(2, len(summary.record.keys)))]


def _slice(summary: SweepSummary, number: int) -> Plot:
    key = summary.record.keys[number]
    name = short_names(summary.record.keys)[key]
    values = values_of(summary.record, key)
    tried = [frozen(t.params.get(key)) for t in summary.ranked]
    numeric = all(map(is_number, tried))
    places = distinct([*values, *tried])
    whole = [len(t.rungs) >= len(summary.ranked[0].rungs) for t in summary.ranked]
    trace = go.Scatter(
        x=tried if numeric else [places.index(value) for value in tried],
        y=[t.score for t in summary.ranked],
        error_y=bars([t.rungs[-1].standard_error for t in summary.ranked]),
        mode="markers",
        marker={
            "size": 10,
            "color": [BLUE if far else GREY for far in whole],
            "symbol": ["circle" if far else "circle-open" for far in whole],
        },
        hovertext=[
            hover(summary, t, len(t.rungs), t.rungs[-1].score, t.rungs[-1].standard_error)
            for t in summary.ranked
        ],
        hoverinfo="text",
    )
    axis = ticks(places, label(name))
    if numeric:
        kind = "log" if is_logarithmic(summary.record, key, tried) else "linear"
        axis = {"title": {"text": label(name)}, "type": kind}
    made = figure(trace, xaxis=axis, yaxis={"title": {"text": label(summary.record.metric)}})
    return Plot(
        f"slice-{number}", made, f"{summary.record.metric} against {name}, a point a trial."
    )


def against_compute(summary: SweepSummary, cost: str, axis: str) -> Plot | None:
    """Every scoring against its cost until then, with the Pareto front.

    Args:
        summary: the sweep's summary.
        cost: `samples` or `device_seconds`.
        axis: the title of the axis.
    """
    if not summary.points:
        return None

    def trace(points: Sequence[Point], **looks: Any) -> go.Scatter:
        return go.Scatter(
            x=[getattr(p, cost) for p in points],
            y=[p.score for p in points],
            hovertext=[
                hover(summary, summary.trial(p.trial), p.rung + 1, p.score, p.standard_error)
                for p in points
            ],
            hoverinfo="text",
            **looks,
        )

    every = {"color": BLUE, "size": 8, "opacity": 0.65}
    best = {"color": ORANGE, "size": 9}
    line = {"color": ORANGE, "width": 2, "shape": "hv"}
    made = figure(
        trace(
            summary.points,
            mode="markers",
            marker=every,
            name="a trial at a rung",
            error_y=bars([point.standard_error for point in summary.points]),
        ),
        trace(
            summary.fronts[cost], mode="lines+markers", line=line, marker=best, name="Pareto front"
        ),
        xaxis={"title": {"text": axis}, "rangemode": "tozero"},
        yaxis={"title": {"text": label(summary.record.metric)}},
    )
    alt = (
        f"{summary.record.metric} against {axis}; {len(summary.fronts[cost])} points on the front."
    )
    return Plot(f"compute-{cost.replace('_', '-')}", made, alt)


def score_curves(summary: SweepSummary) -> Plot | None:
    """Score against pictures seen, with a vertical line at each rung.

    Args:
        summary: the sweep's summary.
    """
    if not summary.ranked:
        return None
    lines = []
    for trial in summary.ranked:
        rungs = [r for r in trial.rungs if math.isfinite(r.score)]
        texts = [hover(summary, trial, r.number + 1, r.score, r.standard_error) for r in rungs]
        samples, scores = [r.samples for r in rungs], [r.score for r in rungs]
        lines.append((trial, samples, scores, texts, bars([r.standard_error for r in rungs])))
    made = _lines(summary, lines, summary.record.metric, mode="lines+markers")
    for rung in summary.record.rung_samples:
        made.add_vline(x=rung, line={"color": GREY, "width": 1, "dash": "dot"})
    return Plot("scores", made, f"{summary.record.metric} against pictures seen, a line a trial.")


def loss_curves(
    summary: SweepSummary, curves: Mapping[int, Sequence[Mapping[str, Any]]]
) -> Plot | None:
    """Training loss against pictures seen.

    Args:
        summary: the sweep's summary.
        curves: rows of `metrics.jsonl` by trial.
    """
    lines = []
    for trial in summary.record.trials:
        rows = [r for r in curves.get(trial.number, ()) if is_number(r.get("loss"))]
        rows = [r for r in rows if is_number(r.get("samples"))]
        # Thinned from the end, so that the newest is kept.
        rows = rows[:: -max(1, math.ceil(len(rows) / _CURVE_POINTS))][::-1]
        if rows:
            samples, losses = ([r[name] for r in rows] for name in ("samples", "loss"))
            lines.append((trial, samples, losses, f"trial {trial.number}", None))
    if not lines:
        return None
    made = _lines(summary, lines, "training loss", mode="lines")
    return Plot("losses", made, "Training loss against pictures seen, a line a trial.")


def _lines(summary: SweepSummary, lines: Sequence[Line], axis: str, *, mode: str) -> go.Figure:
    """A line a trial, coloured by its first key's value; the legend switches values."""
    key = summary.record.keys[0] if summary.record.keys else ""

    def value_of(trial: TrialRecord) -> Any:
        return frozen(trial.params.get(key))

    values = distinct([value_of(trial) for trial, *_ in lines])
    colour = dict(zip(values, colours(values), strict=True))
    order = {value: place for place, value in enumerate(values)}
    told: set[Any] = set()
    traces = []
    ordered = sorted(lines, key=lambda line: order[value_of(line[0])])
    for trial, samples, heights, texts, errors in ordered:
        value = value_of(trial)
        traces.append(
            go.Scatter(
                x=samples,
                y=heights,
                error_y=errors,
                mode=mode,
                line={"color": colour[value], "width": 2},
                marker={"size": 7},
                opacity=0.85,
                name=label(shown(value)),
                legendgroup=str(order[value]),
                showlegend=len(values) <= _LEGEND_ENTRIES and value not in told,
                hovertext=texts,
                hoverinfo="text" if mode == "lines+markers" else "text+y",
            )
        )
        told.add(value)
    name = short_names(summary.record.keys).get(key, "")
    return figure(
        *traces,
        xaxis={"title": {"text": "pictures seen"}, "rangemode": "tozero"},
        yaxis={"title": {"text": label(axis)}},
        legend={"title": {"text": label(name)}, "traceorder": "normal"},
    )
