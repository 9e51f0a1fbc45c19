"""The guide to methods as lists and tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

Row = Mapping[str, str]
Guide = dict[str, list[dict[str, str]]]


def guide_view(guide: Guide) -> RenderableType:
    """The guide for people.

    Args:
        guide: rows by section: choices, profiles, figures, corrections.
    """
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
        "\nWhat circulates wrongly\n",
        *(_listed(correction) for correction in guide["corrections"]),
    )


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
