"""Plots of keys: parallel coordinates, importance, encoder speed by mask ratio."""

from __future__ import annotations

import math
from typing import Any

import plotly.graph_objects as go

from mimray.tuning.report.speed import token_bound
from mimray.tuning.report.summary import SweepSummary, is_logarithmic
from mimray.tuning.report.theme import BLUE, GREY, LINES, ORANGE, Plot, figure, label
from mimray.tuning.report.values import distinct, frozen, is_number, short_names, tick

_FEW = 8
_BOUND_POINTS = 60


def parallel(summary: SweepSummary) -> Plot | None:
    """All keys, pictures seen and score as upright axes, a line a trial.

    Args:
        summary: the sweep's summary.
    """
    if not summary.ranked:
        return None
    names = short_names(summary.record.keys)
    scores = [t.rungs[-1].score for t in summary.ranked]
    samples = [t.rungs[-1].samples for t in summary.ranked]
    low, high = min(scores), max(scores)
    trace = go.Parcoords(
        # plotly draws no colour on a scale without extent.
        line={"color": scores, "colorscale": LINES, "cmin": low, "cmax": max(high, low + 1e-9)},
        dimensions=[
            *(_dimension(summary, key, label(name)) for key, name in names.items()),
            {"label": "samples", "values": samples, **_stops(distinct(samples), "{:,}")},
            {"label": label(summary.record.metric), "values": scores},
        ],
        labelfont={"size": 13},
        tickfont={"size": 12},
        unselected={"line": {"color": GREY, "opacity": 0.15}},
    )
    made = figure(trace, height=380, margin={"l": 70, "r": 60, "t": 48, "b": 24})
    alt = "Parallel coordinates of every key, pictures seen and score, a line a trial."
    return Plot("parallel", made, alt, 130 * (len(names) + 2))


def _dimension(summary: SweepSummary, key: str, name: str) -> dict[str, Any]:
    """An axis: numbers on a linear or logarithmic scale, other values evenly spaced."""
    values = [frozen(t.params.get(key)) for t in summary.ranked]
    places = distinct(values)
    if not all(map(is_number, places)):
        places_of = {value: place for place, value in enumerate(places)}
        # plotly does not read these as HTML, unlike other text.
        texts = [tick(value) for value in places]
        stops = {"tickvals": list(range(len(places))), "ticktext": texts}
        return {"label": name, "values": [places_of[v] for v in values], **stops}
    if is_logarithmic(summary.record, key, places):
        magnitudes = [math.log10(value) for value in values]
        low, high = math.floor(min(magnitudes)), math.ceil(max(magnitudes))
        powers = list(range(low, high + 1))
        stops = {"tickvals": powers, "ticktext": [f"1e{power}" for power in powers]}
        return {"label": name, "values": magnitudes, "range": [low, max(high, low + 1)], **stops}
    return {"label": name, "values": values, **_stops(places, "{:.4g}")}


def _stops(places: list[Any], form: str) -> dict[str, Any]:
    """Ticks at each of a few numbers; none for many, where plotly chooses."""
    if len(places) > _FEW:
        return {}
    return {"tickvals": places, "ticktext": [form.format(place) for place in places]}


def importances(summary: SweepSummary) -> Plot | None:
    """Shares of the score's variance, a bar a key.

    Args:
        summary: the sweep's summary.
    """
    shares = summary.importance.shares
    if not shares:
        return None
    names = short_names(summary.record.keys)
    rows = [(label(names[key]), share) for key, share in reversed(shares.items())]
    trace = go.Bar(
        x=[share for _, share in rows],
        y=[name for name, _ in rows],
        orientation="h",
        marker={"color": BLUE},
        text=[f"{share:.0%}" for _, share in rows],
        textposition="outside",
        cliponaxis=False,
        hoverinfo="skip",
    )
    made = figure(
        trace,
        height=110 + 38 * len(rows),
        bargap=0.4,
        xaxis={"title": {"text": "share of variance explained"}, "tickformat": ".0%"},
        margin={"l": 64, "r": 48, "t": 16, "b": 56},
    )
    made.update_xaxes(range=[0, max(shares.values()) * 1.08 or 1])
    made.update_yaxes(type="category", showgrid=False)
    alt = (
        "Importances: " + ", ".join(f"{names[k]} {share:.0%}" for k, share in shares.items()) + "."
    )
    return Plot("importance", made, alt)


def speed(summary: SweepSummary) -> Plot | None:
    """The encoder's speed over the full sequence by mask ratio.

    Args:
        summary: the sweep's summary.
    """
    if not summary.speed:
        return None
    looks = {
        "quoted": (
            "often quoted",
            {"mode": "markers", "marker": {"color": ORANGE, "size": 11, "symbol": "diamond-open"}},
        ),
        "measured": ("measured", {"mode": "lines+markers", "line": {"color": BLUE}}),
    }
    ends = [row.mask_ratio for row in summary.speed if row.bound is not None]
    steps = [max(ends, default=0.9) * i / _BOUND_POINTS for i in range(_BOUND_POINTS + 1)]
    bound = go.Scatter(
        x=steps,
        y=[token_bound(ratio) for ratio in steps],
        name="bound by tokens",
        mode="lines",
        line={"color": GREY, "dash": "dot"},
    )
    traces = [bound]
    for field, (name, look) in looks.items():
        pairs = [(row.mask_ratio, getattr(row, field)) for row in summary.speed]
        pairs = [(ratio, times) for ratio, times in pairs if times is not None]
        if pairs:
            xs, ys = zip(*pairs, strict=True)
            traces.append(go.Scatter(x=xs, y=ys, name=name, **look))
    made = figure(
        *traces,
        xaxis={"title": {"text": "mask ratio"}, "tickformat": ".0%"},
        yaxis={"title": {"text": "times faster"}, "rangemode": "tozero"},
    )
    return Plot("speed", made, "Encoder speed over the full sequence by mask ratio.")
