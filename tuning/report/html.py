"""The report as one page that needs nothing else: no server, no network.

Everything that a person typed is escaped. Beyond that the page's policy lets no script run but
the two that are named by their digests, and lets nothing be fetched.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from mimray.trainers.storage import RunDir
from mimray.tuning.report import figures, key_figures
from mimray.tuning.report.facts import Facts
from mimray.tuning.report.images import reconstructions
from mimray.tuning.report.sections import SECTIONS, Material, head
from mimray.tuning.report.theme import Plot

REFRESH_S = 20

Curves = Mapping[int, Sequence[Mapping[str, Any]]]


def page(facts: Facts, sweep: RunDir, curves: Curves) -> str:
    """The whole page.

    Args:
        facts: of the sweep.
        sweep: its directory, where the pictures are.
        curves: rows of `metrics.jsonl` by trial.
    """
    material = Material(facts, _plots(facts, curves), reconstructions(facts, sweep))
    bodies = [(name, title, make(material)) for name, title, make in SECTIONS]
    shown = [(name, title, body) for name, title, body in bodies if body]
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title, _ in shown)
    sections = "".join(
        f'<section id="{name}" aria-labelledby="{name}-title">'
        f'<h2 id="{name}-title">{title}</h2>{body}</section>'
        for name, title, body in shown
    )
    return (
        f'<!doctype html><html lang="en"><head>{_meta(facts)}</head><body><div class="page">'
        f'<header>{head(material)}<nav aria-label="Sections"><ul>{links}</ul></nav></header>'
        f"<main>{sections}</main><footer>{_footer(facts)}</footer></div>{_scripts(material)}"
        "</body></html>\n"
    )


def _plots(facts: Facts, curves: Curves) -> dict[str, Plot]:
    made = [
        figures.heatmap(facts),
        *figures.slices(facts),
        figures.against_compute(facts, "samples", "pictures seen"),
        figures.against_compute(facts, "device_seconds", "device-seconds"),
        figures.score_curves(facts),
        figures.loss_curves(facts, curves),
        key_figures.parallel(facts),
        key_figures.importances(facts),
        key_figures.speed(facts),
    ]
    return {plot.name: plot for plot in made if plot is not None}


def _meta(facts: Facts) -> str:
    scripts = " ".join(f"'sha256-{_digest(code)}'" for code in (_plotly(), _asset("page.js")))
    # plotly compiles its parallel coordinates for the GPU at run time, which takes unsafe-eval;
    # only a script that is named here can make use of it.
    policy = (
        f"default-src 'none'; script-src {scripts} 'unsafe-eval'; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    refresh = "" if facts.record.ended else f'<meta http-equiv="refresh" content="{REFRESH_S}">'
    return (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark">{refresh}'
        f"<title>{escape(facts.record.name)}: sweep</title><style>{_asset('page.css')}</style>"
    )


def _scripts(material: Material) -> str:
    # Not even inside a string may the data hold what ends or opens a script.
    trees = ",".join(f'"{p.name}":{p.figure.to_json()}' for p in material.plots.values())
    safe = trees.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return (
        f'<script type="application/json" id="figures">{{{safe}}}</script>'
        f"<script>{_plotly()}</script><script>{_asset('page.js')}</script>"
    )


def _footer(facts: Facts) -> str:
    again = "" if facts.record.ended else f" It reloads every {REFRESH_S} seconds while trials run."
    return (
        "<p>Figures: <code>report.json</code>. As text: <code>report.md</code>. "
        f"This page needs no network.{again}</p>"
    )


@functools.cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


@functools.cache
def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


@functools.cache
def _digest(code: str) -> str:
    return base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
