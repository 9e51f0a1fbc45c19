"""`mimray adapt`."""

from __future__ import annotations

from typing import Any

import click

from mimray.service.cli.options import (
    command_line,
    json_option,
    print_result,
    set_option,
    steps_option,
    verdict_options,
    workers_option,
)


@click.command()
@click.argument("start", metavar="START")
@click.option("--data", required=True, help="Pictures to adapt to; their labels are not read.")
@click.option("--recipe", default=None, help="A recipe; by default by the size of START.")
@click.option("--lora", type=click.IntRange(min=1), default=None, metavar="RANK", help="Adapters.")
@verdict_options
@click.option(
    "--verdict-set",
    "verdict_overrides",
    multiple=True,
    metavar="[TASK.]KEY=VALUE",
    help="An option of the tasks on LABELLED; retain.KEY=VALUE of that on RETAIN.",
)
@click.option("--name", default=None, help="Name of the run; the recipe's by default.")
@click.option(
    "--storage", default="runs", show_default=True, help="Where runs are kept; path or URI."
)
@steps_option
@workers_option
@set_option
@click.option("--register", default=None, metavar="NAME", help="Register the encoder if it gained.")
@click.option("--without-gain", is_flag=True, help="Register it even if it did not.")
@click.option("--fresh", is_flag=True, help="Start over: deletes what the run has.")
@json_option
@click.pass_context
def adapt(
    ctx: click.Context,
    /,
    as_json: bool,
    workers: int | None,
    overrides: tuple[str, ...],
    **asked: Any,
) -> None:
    """Adapt an encoder to your pictures, and judge it; run again to continue.

    START is a bundle, run, registered name, SWEEP:best, timm:NAME or another library's checkpoint.
    It is trained further by masked self-distillation, while a Gram loss holds it to how it began.
    The verdict compares it with START and with an untrained encoder.

    Example: mimray adapt timm:vit_small_patch16_224.dino --data pictures --labelled scenes
    """
    from mimray.service.commands.adapt import AdaptRequest, adapt_text, run_adapt
    from mimray.service.commands.overrides import with_workers

    request = AdaptRequest(
        overrides=with_workers(overrides, workers), command=command_line(), **asked
    )
    result = run_adapt(request)
    print_result(result, as_json, adapt_text)
    if request.register and result["registered"] is None:
        ctx.exit(1)
