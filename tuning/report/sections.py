"""The sections of the page, each a piece of HTML; an empty one is left out with its heading."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import NamedTuple

from mimray.tuning.report import tables
from mimray.tuning.report.facts import Facts
from mimray.tuning.report.images import Picture
from mimray.tuning.report.pieces import (
    details_html,
    picture_html,
    plot_html,
    states_html,
    table_html,
)
from mimray.tuning.report.theme import Plot
from mimray.tuning.report.values import duration, params_text, score_text, short_names

_NONE_YET = '<p class="faint">No trial has a score yet.</p>'


class Material(NamedTuple):
    """What sections are made of.

    Attributes:
        facts: of the sweep.
        plots: by name.
        pictures: reconstructions.
    """

    facts: Facts
    plots: dict[str, Plot]
    pictures: list[Picture]


def _of(count: int, planned: int | None) -> str:
    return str(count) if planned is None else f"{count} of {planned}"


def head(m: Material) -> str:
    """Name and state of the sweep, and what it searches.

    Args:
        m: of the page.
    """
    record = m.facts.record
    state = "ended" if record.ended else "running"
    base = record.config.get("base")
    recipe = str(base.get("recipe", "")) if isinstance(base, dict) else ""
    names = ", ".join(short_names(record.keys).values())
    of = f" of <b>{escape(recipe)}</b>" if recipe else ""
    return (
        f'<div class="title"><h1>{escape(record.name)}</h1>'
        f'<span class="state {state}">{state}</span></div>'
        f'<p class="lead">A search{of} over {escape(names) or "nothing"}.</p>'
    )


def summary(m: Material) -> str:
    """The few figures that matter, and what to mind about them."""
    facts, record = m.facts, m.facts.record
    best, names = facts.best, short_names(record.keys)
    spent = sum(trial.device_seconds for trial in record.trials)
    seen = sum(trial.samples for trial in record.trials)
    cards = [
        (
            f"Best {record.metric}",
            score_text(best.score if best else None),
            f"trial {best.number}: {params_text(best.params, names)}" if best else "none yet",
        ),
        ("Trials", _of(len(record.trials), record.planned), f"{len(facts.ranked)} with a score"),
        ("Elapsed", duration(record.elapsed_s), f"{duration(spent)} of device time"),
        ("Pictures seen", f"{seen:,}", "by all trials"),
    ]
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in cards
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in tables.notes(facts))
    return f'<dl class="figures">{items}</dl>{states_html(facts)}{notes}{_origin(facts)}'


def leaderboard(m: Material) -> str:
    """Trials in the order of their rank."""
    facts = m.facts
    if not facts.ranked:
        return _NONE_YET
    more = len(facts.ranked) - tables.MAX_ROWS
    rest = f'<p class="faint">{more} more are in report.json.</p>' if more > 0 else ""
    return (
        '<p class="faint">Those that came farthest first, among these the best first: scores '
        "after unlike lengths of training are not held against each other.</p>"
        f"{table_html(tables.leaderboard(facts), first_is_best=True)}{rest}"
    )


def two_keys(m: Material) -> str:
    """The heatmap, or scores by one key."""
    facts = m.facts
    if not facts.ranked:
        return _NONE_YET
    if facts.heatmap is None:
        plots = "".join(plot_html(p) for name, p in m.plots.items() if name.startswith("slice-"))
        return (
            '<p class="faint">A point a trial; open circles did not come as far as the best.</p>'
            f'<div class="pair">{plots}</div>'
        )
    table = table_html(tables.heatmap_table(facts.heatmap))
    return (
        '<p class="faint">The best of each square at the last rung it reached; ▸ marks those '
        "that did not reach the end, and the frame the best of all.</p>"
        f"{plot_html(m.plots['heatmap'])}<details><summary>As a table</summary>{table}</details>"
    )


def compute(m: Material) -> str:
    """Score against what was spent."""
    facts = m.facts
    if not facts.points:
        return ""
    parts = []
    for cost, title in (("samples", "Pictures seen"), ("device_seconds", "Device-seconds")):
        table = tables.front_table(facts, cost, f"Pareto front over {title.lower()}")
        parts.append(
            f"<div><h3>{title}</h3>{plot_html(m.plots['compute-' + cost.replace('_', '-')])}"
            f"<details><summary>The front as a table</summary>{table_html(table)}</details></div>"
        )
    return (
        '<p class="faint">A point for every scoring. On the front lie those that no other beats: '
        "none scores as high for less.</p>"
        f'<div class="pair">{"".join(parts)}</div>'
    )


def curves(m: Material) -> str:
    """Scores, and losses where there are any, along the training."""
    parts = []
    if "scores" in m.plots:
        parts.append(f"<div><h3>Score by rung</h3>{plot_html(m.plots['scores'])}</div>")
    if "losses" in m.plots:
        parts.append(f"<div><h3>Training loss</h3>{plot_html(m.plots['losses'])}</div>")
    if not parts:
        return ""
    text = "A line a trial, in the colour of its first key; dotted lines are rungs."
    return f'<p class="faint">{text}</p><div class="pair">{"".join(parts)}</div>'


def parallel(m: Material) -> str:
    """All keys at once."""
    if "parallel" not in m.plots:
        return ""
    return (
        '<p class="faint">A line a trial, in the colour of its score. Drag along an axis to keep '
        f"some of its values, and a heading to move its axis.</p>{plot_html(m.plots['parallel'])}"
    )


def importance(m: Material) -> str:
    """How much each key matters."""
    found = m.facts.importance
    if "importance" not in m.plots:
        return f'<p class="faint">None yet: {escape(found.reason)}.</p>'
    assert found.rung is not None
    return (
        f'<p class="faint">By fANOVA, from {found.trials} trials with a score at rung '
        f"{found.rung + 1} of {m.facts.rungs}, which are those that the scheduler let come so far: "
        "a hint, not a finding.</p>"
        f"{plot_html(m.plots['importance'])}"
    )


def speed(m: Material) -> str:
    """What masking saves in the encoder."""
    if not m.facts.speed:
        return ""
    measured = any(row.measured is not None for row in m.facts.speed)
    text = (
        "Forward and backward on visible tokens alone, against the full sequence. "
        if measured
        else "Not measured here; the bound follows from the number of tokens. "
    )
    return (
        f'<p class="faint">{text}The bound is 1 / (1 − mask ratio). The quoted figures are '
        "rounded, and 1× at 15 % is too low. Encoders that see mask tokens gain nothing.</p>"
        f'<div class="pair">{plot_html(m.plots["speed"])}'
        f"{table_html(tables.speed_table(m.facts))}</div>"
    )


def reconstructions(m: Material) -> str:
    """Pictures of the best trials and the worst."""
    if not m.facts.ranked:
        return ""
    if not m.pictures:
        return '<p class="faint">None has been drawn yet.</p>'
    pictures = "".join(picture_html(picture, m.facts) for picture in m.pictures)
    return f'<div class="pair">{pictures}</div>'


def failures(m: Material) -> str:
    """What went wrong, and what was got over."""
    facts = m.facts
    text = f"<p>Losses of processes or nodes that trials survived: {facts.survived}.</p>"
    if not facts.failed:
        return f"<p>No trial has failed.</p>{text}"
    return f"{table_html(tables.failure_table(facts))}{text}"


def commands(m: Material) -> str:
    """What to type next."""
    return "".join(
        f'<h3>{escape(purpose)}</h3><pre tabindex="0"><code>{escape(command)}</code></pre>'
        for purpose, command in tables.commands(m.facts.record, m.facts.best)
    )


SECTIONS: tuple[tuple[str, str, Callable[[Material], str]], ...] = (
    ("summary", "Summary", summary),
    ("leaderboard", "Leaderboard", leaderboard),
    ("keys", "Score by keys", two_keys),
    ("compute", "Score against compute", compute),
    ("curves", "Learning curves", curves),
    ("parallel", "Parallel coordinates", parallel),
    ("importance", "Importance of the keys", importance),
    ("speed", "Encoder speed", speed),
    ("reconstructions", "Reconstructions", reconstructions),
    ("failures", "Failures", failures),
    ("commands", "Commands", commands),
)


def _origin(facts: Facts) -> str:
    record = facts.record
    rows = {
        "Directory": record.uri,
        "Pictures trained on": record.data,
        "Their fingerprint": record.data_fingerprint,
        "Pictures scored on": record.score_data,
        "Keys": ", ".join(record.keys),
        "Rungs, pictures seen": ", ".join(f"{samples:,}" for samples in record.rung_samples),
        "Seed": str(record.seed),
        "Optuna's study": " in ".join(part for part in record.study if part),
    }
    return details_html("Where it comes from", rows)
