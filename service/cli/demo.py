"""`mimray demo`."""

from __future__ import annotations

from pathlib import Path

import click

from mimray.service.cli.options import command_line, json_option, print_result


@click.command()
@click.option("--out", default="runs/demo", show_default=True, help="Directory of everything made.")
@click.option("--steps", default=800, show_default=True, type=click.IntRange(min=2))
@click.option("--fresh", is_flag=True, help="Start over instead of reusing what is there.")
@json_option
def demo(out: str, steps: int, fresh: bool, as_json: bool) -> None:
    """Ingest, train, score and serve photographs that come with the installation; a few minutes.

    Example: mimray demo --out runs/demo
    """
    from mimray.service.commands.demo import run_demo

    result = run_demo(Path(out), steps=steps, fresh=fresh, command=command_line())
    print_result(result, as_json)
