"""The commands that search, and those that show what was found."""

from __future__ import annotations

import json

import click

from mimray.service.cli.options import command_line, json_option


@click.command()
@click.argument("sweep", required=False, metavar="SWEEP.yaml|NAME")
@click.option("--data", default=None, help="Pictures to train on; any pyarrow.fs URI.")
@click.option("--set", "overrides", multiple=True, metavar="A.B=VALUE", help="Override a key.")
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
    ctx: click.Context,
    sweep: str | None,
    data: str | None,
    overrides: tuple[str, ...],
    name: str | None,
    storage: str,
    concurrent: int | None,
    resume: str | None,
    fresh: bool,
    list_: bool,
    as_json: bool,
) -> None:
    """Search recipes, ranked by what the frozen encoder is worth; run again to continue.

    \b
    base.recipe    the recipe that every trial begins with
    space.KEY      what to try: grid, choice, uniform, loguniform or int
    budget.trials  how many; budget.steps how long each
    score.task     knn, linear, segmentation; rankme needs no labels

    Example: mimray tune mae-mask-depth --data pictures --set budget.steps=400
    """  # noqa: D301 (click wants the character)
    if list_:
        _list(as_json)
        return
    from mimray.service.commands.tune import run_tune

    result = run_tune(
        sweep,
        data=data,
        name=name,
        storage=storage,
        overrides=overrides,
        concurrent=concurrent,
        resume=resume,
        fresh=fresh,
        command=command_line(),
    )
    if as_json:
        click.echo(json.dumps(result))
    if result["interrupted"] or result["best"] is None:
        ctx.exit(1)


@click.command()
@click.option("--sweep", default=None, metavar="NAME", help="Also open this sweep's study.")
@click.option("--storage", default="runs", show_default=True, help="Where runs are tracked.")
@click.option("--port", default=5000, show_default=True, type=click.IntRange(1, 65534))
def ui(sweep: str | None, storage: str, port: int) -> None:
    """Open MLflow, and with --sweep optuna-dashboard, on 127.0.0.1 until Ctrl-C.

    Example: mimray ui --sweep mae-mask-depth
    """
    from mimray.service.commands.ui import run_ui

    run_ui(storage, sweep, port)


def _list(as_json: bool) -> None:
    from mimray.tuning.plan import load_sweep, shipped_sweeps

    found = {name: load_sweep(name).about for name in shipped_sweeps()}
    if as_json:
        click.echo(json.dumps({n: a.model_dump() if a else None for n, a in found.items()}))
        return
    for name, about in found.items():
        click.echo(f"{name}  {about.summary if about else ''}")
        if about:
            click.echo(f"{'':{len(name)}}  {about.command}")
