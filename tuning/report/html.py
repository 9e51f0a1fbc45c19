"""The report as one HTML page that needs neither server nor network.

The templates in `page/` escape every text. Beyond that the page's Content-Security-Policy lets no
script run but the two that it names by their digests, and lets nothing be fetched.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from mimray.trainers.storage import RunDir
from mimray.tuning.report import figures, key_figures, tables
from mimray.tuning.report.images import reconstructions
from mimray.tuning.report.summary import SweepSummary
from mimray.tuning.report.theme import Plot
from mimray.tuning.report.values import duration, params_text, score_text, short_names

REFRESH_S = 20

Curves = Mapping[int, Sequence[Mapping[str, Any]]]


def page(summary: SweepSummary, sweep: RunDir, curves: Curves) -> str:
    """Render the whole page.

    Args:
        summary: the sweep's summary.
        sweep: the sweep's directory, where the pictures are.
        curves: rows of `metrics.jsonl` by trial.
    """
    record = summary.record
    base = record.config.get("base")
    plots = _plots(summary, curves)
    scripts = (_plotly(), _asset("page.js"))
    return (
        _environment()
        .get_template("page.html")
        .render(
            summary=summary,
            record=record,
            recipe=str(base.get("recipe", "")) if isinstance(base, dict) else "",
            names=short_names(record.keys),
            tables=tables,
            plots=plots,
            pictures=reconstructions(summary, sweep),
            figures=_json(plots),
            refresh_s=REFRESH_S,
            style=Markup(_asset("page.css")),
            scripts=[Markup(script) for script in scripts],
            script_digests=Markup(" ".join(f"'sha256-{_digest(script)}'" for script in scripts)),
        )
    )


def _plots(summary: SweepSummary, curves: Curves) -> dict[str, Plot]:
    made = [
        figures.heatmap(summary),
        *figures.slices(summary),
        figures.against_compute(summary, "samples", "pictures seen"),
        figures.against_compute(summary, "device_seconds", "device-seconds"),
        figures.score_curves(summary),
        figures.loss_curves(summary, curves),
        key_figures.parallel(summary),
        key_figures.importances(summary),
        key_figures.speed(summary),
    ]
    return {plot.name: plot for plot in made if plot is not None}


def _json(plots: Mapping[str, Plot]) -> Markup:
    """The figures by name, as JSON inside a script."""
    # Not even inside a string may the data hold what ends or opens a script.
    trees = ",".join(f'"{name}":{plot.figure.to_json()}' for name, plot in plots.items())
    safe = trees.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return Markup(f"{{{safe}}}")


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_asset),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "score": score_text,
        "params": params_text,
        "duration": duration,
        "thousands": "{:,}".format,
    }
    return environment


@functools.cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


@functools.cache
def _asset(name: str) -> str:
    return resources.files(__package__).joinpath("page", name).read_text(encoding="utf-8")


@functools.cache
def _digest(code: str) -> str:
    return base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
