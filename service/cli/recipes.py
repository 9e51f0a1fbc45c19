"""`mimray recipes`."""

from __future__ import annotations

import click

from mimray.service.cli.options import json_option, print_result


@click.command()
@click.argument("name", required=False)
@json_option
def recipes(name: str | None, as_json: bool) -> None:
    """List the shipped recipes, or print one with every key and default.

    Example: mimray recipes mae-tiny
    """
    from mimray.service.commands import recipes as shown

    if name is None:
        print_result(shown.shipped(), as_json, shown.listing)
    else:
        print_result(shown.resolved(name), as_json, shown.as_yaml)
