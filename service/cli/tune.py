"""`mimray tune`."""

from __future__ import annotations

from typing import Any

import click

from mimray.service.cli.options import (
    command_line,
    json_option,
    label_option,
    print_result,
    set_option,
)


@click.command()
@click.argument("sweep", required=False, metavar="SWEEP.yaml|NAME")
@click.option("--data", default=None, help="Pictures to train on; any pyarrow.fs URI.")
@set_option
@label_option
@click.option("--name", default=None, help="Name of the sweep; the file's by default.")
@click.option(
    "--storage", default="runs", show_default=True, help="Where sweeps are kept; path or URI."
)
@click.option(
    "--concurrent", type=click.IntRange(min=1), default=None, help="Trials at once; all that fit."
)
@click.option("--resume", default=None, metavar="NAME", help="Go on with a sweep as it was begun.")
@click.option("--fresh", is_flag=True, help="Start over: deletes what the sweep has.")
@click.option("--list", "list_", is_flag=True, help="List the shipped sweeps.")
@json_option
@click.pass_context
def tune(
    ctx: click.Context, /, list_: bool, as_json: bool, label: str | None, **asked: Any
) -> None:
    """Search recipes, ranked by what the frozen encoder is worth; run again to continue.

    \b
    base.recipe    the recipe that every trial begins with
    space.KEY      what to try: grid, choice, uniform, loguniform or int
    budget.trials  how many; budget.steps how long each
    score.task     knn, linear, segmentation, dense-knn; rankme needs no labels

    Example: mimray tune mae-mask-depth --data pictures --set budget.steps=400
    """  # noqa: D301 (click wants the character)
    from mimray.service.commands import tune as sweeps

    if list_:
        print_result(sweeps.shipped(), as_json, sweeps.listing)
        return
    if label is not None:
        asked["overrides"] = (*asked["overrides"], f"score.label={label}")
    result = sweeps.run_tune(sweeps.TuneRequest(**asked, command=command_line()))
    print_result(result, as_json)
    if result["interrupted"] or result["best"] is None:
        ctx.exit(1)
