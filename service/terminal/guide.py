"""The guide to methods as lists and tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypedDict

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

Row = dict[str, str]


class Measured(TypedDict):
    """Figures measured with mimray itself.

    Attributes:
        conditions: what they were measured on.
        rows: a method and its figures each; `-` for one that is missing.
    """

    conditions: str
    rows: list[Row]


class Guide(TypedDict):
    """The guide to methods.

    Attributes:
        choices: a need and the method for it each.
        profiles: methods side by side.
        figures: published scores.
        corrections: what circulates wrongly.
        measured: scores measured with mimray.
    """

    choices: list[Row]
    profiles: list[Row]
    figures: list[Row]
    corrections: list[Row]
    measured: Measured


def guide_view(guide: Guide) -> RenderableType:
    """The guide for people."""
    figures = guide["figures"]
    return Group(
        "Which method for what. `mimray plan RECIPE` counts what one costs.\n",
        *(_listed(choice) for choice in guide["choices"]),
        _table("Side by side", guide["profiles"]),
        _table(
            "Published: ImageNet-1k top-1 %, COCO box AP, ADE20K mIoU",
            [{name: row[name] for name in row if name != "source"} for row in figures],
        ),
        _grid((f"{row['method']} {row['model']}", row["source"]) for row in figures),
        *_measured(guide["measured"]),
        "\nWhat circulates wrongly\n",
        *(_listed(correction) for correction in guide["corrections"]),
    )


def _measured(measured: Measured) -> Iterator[RenderableType]:
    """The table of what was measured, and on what; nothing where nothing was."""
    if measured["rows"]:
        yield _table("\nMeasured with mimray", measured["rows"])
        yield measured["conditions"]


def _listed(row: Row) -> Table:
    """A row as lines, a field each, and an empty one."""
    return _grid([*row.items(), ("", "")])


def _grid(pairs: Iterable[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    for name, text in pairs:
        grid.add_row(name, text)
    return grid


def _table(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for field in rows[0]:
        table.add_column(field.replace("_", " "))
    for row in rows:
        table.add_row(*row.values())
    return table
