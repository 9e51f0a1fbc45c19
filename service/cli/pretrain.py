"""`mimray pretrain`."""

from __future__ import annotations

from pathlib import Path

import click

from mimray.service.cli.options import (
    command_line,
    init_options,
    json_option,
    print_result,
    set_option,
    steps_option,
    workers_option,
)


@click.command()
@click.argument("recipe")
@click.option("--data", required=True, help="Folder of pictures or Parquet; any pyarrow.fs URI.")
@click.option("--name", default=None, help="Name of the run; the recipe's by default.")
@click.option(
    "--storage", default="runs", show_default=True, help="Where runs are kept; path or URI."
)
@init_options
@steps_option
@workers_option
@set_option
@click.option("--fresh", is_flag=True, help="Start over: deletes what the run has.")
@json_option
def pretrain(
    recipe: str,
    data: str,
    name: str | None,
    storage: str,
    init: str | None,
    partial: bool,
    steps: int | None,
    workers: int | None,
    overrides: tuple[str, ...],
    fresh: bool,
    as_json: bool,
) -> None:
    """Pre-train; run the same command again to continue.

    Example: mimray pretrain mae-tiny --data pictures --steps 100 --set method.mask_ratio=0.6
    """
    from mimray.service.commands.overrides import with_init, with_workers
    from mimray.service.commands.pretrain import run_pretrain

    result = run_pretrain(
        recipe,
        data=data,
        name=name or Path(recipe).stem,
        storage=storage,
        steps=steps,
        overrides=with_workers(with_init(overrides, init, partial), workers),
        fresh=fresh,
        command=command_line(),
    )
    print_result(result, as_json)
