"""Small pieces of the page: tables, plots, pictures. All text is escaped here."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from mimray.tuning.report.facts import Facts
from mimray.tuning.report.images import Picture
from mimray.tuning.report.tables import Table
from mimray.tuning.report.theme import Plot
from mimray.tuning.report.values import params_text, score_text, short_names

_LONG = 24  # characters; longer cells are broken into lines


def table_html(table: Table, *, first_is_best: bool = False) -> str:
    """A table that scrolls by itself where it is wider than the page.

    Args:
        table: as text.
        first_is_best: whether its first row is to stand out.
    """
    long = {i for row in table.rows for i, text in enumerate(row) if len(text) > _LONG}

    def cell(tag: str, scope: str, column: int, text: str) -> str:
        kind = "number" if column in table.numeric else "long" if column in long else ""
        return f"<{tag}{scope}{kind and f' class={kind}'}>{escape(text)}</{tag}>"

    heads = "".join(cell("th", ' scope="col"', i, text) for i, text in enumerate(table.head))
    rows = []
    for number, row in enumerate(table.rows):
        best = ' class="first"' if first_is_best and not number else ""
        cells = [
            cell("td", "", i, text) if i else cell("th", ' scope="row"', i, text)
            for i, text in enumerate(row)
        ]
        rows.append(f"<tr{best}>{''.join(cells)}</tr>")
    title = escape(table.title)
    # Focusable, so that it can be scrolled without a pointer.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{title}"><table>'
        f"<caption>{title}</caption><thead><tr>{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def plot_html(plot: Plot) -> str:
    """The place that the page's script draws a plot into.

    Args:
        plot: to be drawn.
    """
    alt = escape(plot.alt)
    size = f"height:{int(plot.figure.layout.height)}px;min-width:{plot.min_width}px"
    return (
        f'<figure class="scroll" tabindex="0" role="img" aria-label="{alt}">'
        f'<div class="plot" id="plot-{plot.name}" style="{size}"></div></figure>'
    )


def picture_html(picture: Picture, facts: Facts) -> str:
    """A reconstruction with its caption.

    Args:
        picture: of a trial.
        facts: of the sweep.
    """
    trial = picture.trial
    place = "Best" if picture.rank == 1 else f"Rank {picture.rank} of {len(facts.ranked)}"
    tried = params_text(trial.params, short_names(facts.record.keys))
    score = f"{facts.record.metric} {score_text(trial.score)}"
    width, height = picture.size
    alt = escape(f"What trial {trial.number} makes of hidden patches, beside the originals")
    return (
        f'<figure><img src="{picture.uri}" alt="{alt}" width="{width}" height="{height}">'
        f"<figcaption><b>{place}</b>, trial {trial.number}: {escape(tried)}; {escape(score)}"
        "</figcaption></figure>"
    )


def states_html(facts: Facts) -> str:
    """How many trials are in which state, as a bar with its key.

    Args:
        facts: of the sweep.
    """
    if not facts.states:
        return '<p class="faint">No trial has started yet.</p>'
    bar = "".join(
        f'<span style="--share:{number};--colour:var(--{state})"></span>'
        for state, number in facts.states.items()
    )
    key = "".join(
        f'<li style="--colour:var(--{state})">{number} {state}</li>'
        for state, number in facts.states.items()
    )
    return f'<div class="bar" aria-hidden="true">{bar}</div><ul class="key">{key}</ul>'


def details_html(summary: str, rows: Mapping[str, str]) -> str:
    """Things that few will look for, folded away.

    Args:
        summary: to unfold by.
        rows: names and values.
    """
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows.items() if value
    )
    return f'<details><summary>{escape(summary)}</summary><dl class="facts">{items}</dl></details>'
