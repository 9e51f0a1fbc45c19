"""The guide to methods: by need, what was published and measured, and what circulates wrongly.

The rows lie in `guide.yaml`, those of figures measured with mimray itself in `measured.yaml`.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

import yaml

from mimray.service.terminal.console import as_text
from mimray.service.terminal.guide import Guide, Measured, Row, guide_view


def read_guide() -> Guide:
    """The guide's rows, by section; a choice has the measured figures that speak to it."""
    guide: Guide = _read("guide.yaml")
    measured: Measured = _read("measured.yaml")
    guide["choices"] = [_with_figures(choice, measured["rows"]) for choice in guide["choices"]]
    guide["measured"] = measured
    return guide


def guide_text(guide: Guide) -> str:
    """The guide for people, as wide as the terminal."""
    return as_text(guide_view(guide))


def _with_figures(choice: Row, rows: list[Row]) -> Row:
    """A choice with the figures that its `measured` names, the best first; without any, none."""
    columns = choice.get("measured", "")
    found = [text for column in columns.split(", ") if (text := ranking(rows, column))]
    others = {key: text for key, text in choice.items() if key != "measured"}
    return others | ({"measured": "; ".join(found)} if found else {})


def ranking(rows: list[Row], column: str) -> str:
    """Methods by one measured figure, such as `linear: mae 35.2, untrained 23.7`.

    Args:
        rows: rows of `measured.yaml`.
        column: the figure's name.

    Returns:
        The best first; empty where no method has the figure.
    """
    having = [row for row in rows if row.get(column, "-") != "-"]
    having.sort(key=lambda row: float(row[column]), reverse=True)
    shown = ", ".join(f"{row['method']} {row[column]}" for row in having)
    return f"{column.replace('_', ' ')}: {shown}" if shown else ""


def _read(name: str) -> Any:
    return yaml.safe_load(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))
