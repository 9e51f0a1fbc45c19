"""`mimray plan`."""

from __future__ import annotations

import click

from mimray.service.cli.options import (
    init_options,
    json_option,
    print_result,
    set_option,
    steps_option,
    workers_option,
)


@click.command()
@click.argument("recipe", required=False)
@click.option("--data", default=None, help="Dataset to plan for; ImageNet-1k's size by default.")
@init_options
@steps_option
@workers_option
@set_option
@click.option(
    "--tflops",
    type=click.FloatRange(min=0, min_open=True),
    help="TFLOP/s that a device sustains, to tell the time.",
)
@json_option
def plan(
    recipe: str | None,
    data: str | None,
    init: str | None,
    partial: bool,
    steps: int | None,
    workers: int | None,
    overrides: tuple[str, ...],
    tflops: float | None,
    as_json: bool,
) -> None:
    """Count what a recipe would cost, before anything runs: parameters, FLOPs, memory, time.

    Without RECIPE, a guide to which method serves what.

    Example: mimray plan mae-vit-b --workers 8
    """
    from mimray.service.commands.guide import guide_text, read_guide
    from mimray.service.commands.overrides import with_init, with_workers
    from mimray.service.commands.plan import forecast, forecast_text

    if recipe is None:
        print_result(read_guide(), as_json, guide_text)
        return
    found = forecast(
        recipe,
        data=data,
        steps=steps,
        overrides=with_workers(with_init(overrides, init, partial), workers),
        tflops=tflops,
    )
    print_result(found, as_json, forecast_text)
