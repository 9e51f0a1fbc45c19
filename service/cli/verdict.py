"""`mimray verdict`."""

from __future__ import annotations

from typing import Any

import click

from mimray.service.cli.options import (
    command_line,
    json_option,
    print_result,
    verdict_options,
)


@click.command()
@click.argument("adapted")
@click.argument("start")
@click.option("--data", required=True, help="The pictures adapted to; no labels are read.")
@verdict_options
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="[TASK.]KEY=VALUE",
    help="An option of the tasks on LABELLED; retain.KEY=VALUE of that on RETAIN.",
)
@click.option("--out", default=None, help="Where the verdict goes; verdict/ of ADAPTED's run.")
@json_option
def verdict(as_json: bool, **asked: Any) -> None:
    """Judge an adapted encoder against its start and an untrained one.

    ADAPTED and START are runs, bundles or registered names. A gain is claimed where the 95 %
    interval of the paired difference lies above 0 for at least one figure on LABELLED and below 0
    for none. Without labels there is no claim, only what changed. Run again after a kill, it goes
    on.

    Example: mimray verdict runs/adapted runs/start --data pictures --labelled scenes
    """
    from mimray.service.commands.verdict import VerdictRequest, run_verdict, verdict_text

    found = run_verdict(VerdictRequest(command=command_line(), **asked))
    print_result(found, as_json, verdict_text)
