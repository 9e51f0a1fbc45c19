"""The report as Markdown, in short, for a terminal or a pull request."""

from __future__ import annotations

import re

from mimray.tuning.report import tables
from mimray.tuning.report.summary import SweepSummary
from mimray.tuning.report.tables import Table
from mimray.tuning.report.values import params_text, short_names

_MARKS = re.compile(r"([\\`*_{}\[\]#|~])")


def markdown(summary: SweepSummary) -> str:
    """Render the report as Markdown.

    Args:
        summary: the sweep's summary.
    """
    parts = [
        _head(summary),
        _section("Leaderboard", _table(tables.leaderboard(summary)) if summary.ranked else ""),
        _heatmap(summary),
        _importance(summary),
        _section("Encoder speed", _table(tables.speed_table(summary)) if summary.speed else ""),
        _section("Failures", _failures(summary)),
        _section("Commands", _commands(summary)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(summary: SweepSummary) -> str:
    record, best = summary.record, summary.best
    state = "ended" if record.ended else "running"
    found = "No trial has a score yet."
    if best is not None:
        tried = params_text(best.params, short_names(record.keys))
        found = f"Best {record.metric} {tables.chosen_text(summary)}: trial {best.number}, {tried}."
        if record.final is not None:
            found = (
                f"Trial {best.number}, {tried}: {record.metric} {tables.final_text(summary)}. "
                f"It was chosen by {tables.chosen_text(summary)}."
            )
    lines = [f"{state}: {tables.outcome(summary)}.", found, *tables.notes(summary)]
    title = f"# {_safe(record.name)}"
    return "\n\n".join([title, *map(_safe, lines)])


def _heatmap(summary: SweepSummary) -> str:
    if summary.heatmap is None or not summary.ranked:
        return ""
    table = tables.heatmap_table(summary.heatmap)
    note = "▸ marks squares whose best trial did not reach the last rung."
    return _section(table.title, f"{_table(table)}\n\n{note}")


def _importance(summary: SweepSummary) -> str:
    found = summary.importance
    if not found.shares:
        return _section("Importance of the keys", f"None yet: {_safe(found.reason)}.")
    assert found.rung is not None
    note = f"By fANOVA, from {found.trials} trials at rung {found.rung + 1} of {summary.rungs}."
    return _section(
        "Importance of the keys", f"{_table(tables.importance_table(summary))}\n\n{note}"
    )


def _failures(summary: SweepSummary) -> str:
    table = f"{_table(tables.failure_table(summary))}\n\n" if summary.failed else ""
    return f"{table}Losses of processes or nodes that trials survived: {summary.survived}."


def _commands(summary: SweepSummary) -> str:
    lines = []
    for purpose, command in tables.commands(summary.record, summary.best):
        lines += [f"# {purpose}", command]
    text = "\n".join(lines)
    # A fence must be longer than any run of backticks inside.
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}sh\n{text}\n{fence}"


def _section(title: str, body: str) -> str:
    return f"## {_safe(title)}\n\n{body}" if body else ""


def _table(table: Table) -> str:
    rule = ["---:" if i in table.numeric else "---" for i in range(len(table.head))]
    rows = [_row(table.head), "| " + " | ".join(rule) + " |", *map(_row, table.rows)]
    return "\n".join(rows)


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(map(_safe, cells)) + " |"


def _safe(text: str) -> str:
    """A text in one line, with Markdown's marks escaped."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKS.sub(r"\\\1", text)
