"""The command line. Thin: it parses, calls one function, prints; imports happen inside.

Exit status: 0 success, 2 a user's mistake told in one line, 1 anything else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mimray.service.cli.data import data
from mimray.service.cli.evaluate import evaluate, extract
from mimray.service.cli.keys import keys
from mimray.service.cli.models import models
from mimray.service.cli.options import command_line, json_option
from mimray.service.cli.serve import serve
from mimray.service.cli.tune import tune, ui
from mimray.trainers.errors import MimrayError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _Group(click.Group):
    """Turns our errors into one line on standard error and the right exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MimrayError as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)


@click.group(cls=_Group, context_settings=CONTEXT)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.version_option(package_name="mimray", prog_name="mimray")
def cli(debug: bool) -> None:
    """Pre-train a masked image model on your own pictures, and serve its encoder.

    Example: mimray pretrain mae-tiny --data PICTURES --steps 100
    """
    from mimray.service.cluster import set_environment

    set_environment()


@cli.command()
@click.option("--out", default="runs/demo", show_default=True, help="Directory of everything made.")
@click.option("--steps", default=800, show_default=True, type=click.IntRange(min=2))
@click.option("--fresh", is_flag=True, help="Start over instead of reusing what is there.")
@json_option
def demo(out: str, steps: int, fresh: bool, as_json: bool) -> None:
    """The whole way on photographs that come with the installation, in a few minutes.

    Example: mimray demo --out runs/demo
    """
    from mimray.service.commands.demo import run_demo

    result = run_demo(Path(out), steps=steps, fresh=fresh)
    if as_json:
        click.echo(json.dumps(result))


@cli.command()
@click.option("--storage", default="runs", show_default=True, help="Where runs would be kept.")
@json_option
@click.pass_context
def doctor(ctx: click.Context, storage: str, as_json: bool) -> None:
    """Check this machine; each line says ok, or what to do.

    Example: mimray doctor
    """
    from mimray.service.commands.doctor import as_json as to_json
    from mimray.service.commands.doctor import diagnose, render

    findings = diagnose(storage=storage)
    click.echo(to_json(findings) if as_json else render(findings))
    if any(f.status == "fail" for f in findings):
        ctx.exit(2)


@cli.command()
@click.argument("name", required=False)
@json_option
def recipes(name: str | None, as_json: bool) -> None:
    """List the shipped recipes, or print one with every key and default.

    Example: mimray recipes mae-tiny
    """
    import yaml

    from mimray.trainers.config.recipes import load_recipe, shipped_recipes

    if name is not None:
        tree = load_recipe(name).model_dump(mode="json")
        click.echo(json.dumps(tree) if as_json else yaml.safe_dump(tree, sort_keys=False).rstrip())
        return
    summaries = {n: load_recipe(n).about for n in shipped_recipes()}
    if as_json:
        click.echo(json.dumps({n: a.model_dump() if a else None for n, a in summaries.items()}))
        return
    width = max(map(len, summaries))
    for n, about in summaries.items():
        click.echo(f"{n:{width}}  {about.summary if about else ''}")
        if about:
            click.echo(f"{'':{width}}  {about.command}")


@cli.command()
@click.argument("recipe", required=False)
@click.option("--data", default=None, help="Dataset to plan for; ImageNet-1k's size by default.")
@click.option("--steps", type=click.IntRange(min=1), default=None, help="Length, in updates.")
@click.option("--workers", type=click.IntRange(min=1), default=None, help="Training workers.")
@click.option("--set", "overrides", multiple=True, metavar="A.B=VALUE", help="Override a key.")
@click.option(
    "--tflops", type=click.FloatRange(min=0, min_open=True), help="Sustained by a device, for time."
)
@json_option
def plan(
    recipe: str | None,
    data: str | None,
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
    from rich.console import Console

    from mimray.service.commands import guide
    from mimray.service.commands import plan as planning

    console = Console(highlight=False)
    if recipe is None:
        if as_json:
            click.echo(json.dumps(guide.as_rows()))
        else:
            console.print(guide.render())
        return
    if workers is not None:
        overrides = (*overrides, f"resources.num_workers={workers}")
    found = planning.forecast(recipe, data=data, steps=steps, overrides=overrides, tflops=tflops)
    if as_json:
        click.echo(json.dumps(found))
    else:
        console.print(planning.render(found))


@cli.command()
@click.argument("recipe")
@click.option("--data", required=True, help="Folder of pictures or Parquet; any pyarrow.fs URI.")
@click.option("--name", default=None, help="Name of the run; the recipe's by default.")
@click.option(
    "--storage", default="runs", show_default=True, help="Where runs are kept; path or URI."
)
@click.option("--steps", type=click.IntRange(min=1), default=None, help="Length, in updates.")
@click.option("--workers", type=click.IntRange(min=1), default=None, help="Training workers.")
@click.option("--set", "overrides", multiple=True, metavar="A.B=VALUE", help="Override a key.")
@click.option("--fresh", is_flag=True, help="Start over: deletes what the run has.")
@json_option
def pretrain(
    recipe: str,
    data: str,
    name: str | None,
    storage: str,
    steps: int | None,
    workers: int | None,
    overrides: tuple[str, ...],
    fresh: bool,
    as_json: bool,
) -> None:
    """Pre-train; run the same command again to continue.

    Example: mimray pretrain mae-tiny --data pictures --steps 100 --set method.mask_ratio=0.6
    """
    from mimray.service.commands.pretrain import run_pretrain

    if workers is not None:
        overrides = (*overrides, f"resources.num_workers={workers}")
    result = run_pretrain(
        recipe,
        data=data,
        name=name or Path(recipe).stem,
        storage=storage,
        steps=steps,
        overrides=overrides,
        fresh=fresh,
        command=command_line(),
    )
    if as_json:
        click.echo(json.dumps(result))


@cli.command()
@click.argument("run")
@click.argument("pictures", nargs=-1, required=True)
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--mask-ratio", type=click.FloatRange(0, 1, min_open=True, max_open=True))
@click.option("--seed", default=0, show_default=True, help="Of the masks and of drawn samples.")
@click.option(
    "--oracle", is_flag=True, help="Lend normalised targets the hidden patches' own colours."
)
def reconstruct(
    run: str,
    pictures: tuple[str, ...],
    out: Path,
    mask_ratio: float | None,
    seed: int,
    oracle: bool,
) -> None:
    """Draw what the method makes of pictures of yours, beside the originals.

    Example: mimray reconstruct runs/demo a.jpg b.jpg --out sheet.png
    """
    from mimray.service.commands.pretrain import draw_reconstructions

    count = draw_reconstructions(
        run, pictures, out, mask_ratio=mask_ratio, seed=seed, oracle=oracle
    )
    click.echo(f"{out}: {count} pictures")


@cli.command()
@click.argument("run")
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["bundle", "timm", "transformers"]),
    default="bundle",
    show_default=True,
)
def export(run: str, out: Path | None, kind: str) -> None:
    """Write a run's frozen encoder as a bundle, or for timm or transformers.

    Without OUT a bundle goes into the run's own directory, from its newest checkpoint.

    Example: mimray export runs/mae-tiny exported --format timm
    """
    from mimray.service.commands.pretrain import export_run

    click.echo(export_run(run, out, kind))


@cli.command("import")
@click.argument("checkpoint")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--image-size", default=None, metavar="N|HxW", help="Pixels; the weights' own.")
@click.option(
    "--as", "architecture", default=None, metavar="ARCH", help="timm's name of the model."
)
@click.option("--set", "overrides", multiple=True, metavar="A.B=VALUE", help="What it leaves open.")
@click.option("--partial", is_flag=True, help="Keep what fits, list what does not.")
@click.option("--name", default="", help="Name of the encoder; the checkpoint's by default.")
@json_option
def import_(
    checkpoint: str,
    out: Path,
    image_size: str | None,
    architecture: str | None,
    overrides: tuple[str, ...],
    partial: bool,
    name: str,
    as_json: bool,
) -> None:
    """Turn public weights into a bundle.

    CHECKPOINT is a file of the official MAE, BEiT, SimMIM or MaskFeat code, a folder of timm or
    transformers, a bare file of timm's weights (--as says of what), or timm:NAME.

    Example: mimray import mae_pretrain_vit_base.pth mae-vit-b --image-size 448
    """
    from mimray.service.commands.import_weights import run_import

    result = run_import(
        checkpoint,
        out,
        architecture=architecture,
        image_size=image_size,
        overrides=overrides,
        partial=partial,
        name=name,
        command=command_line(),
    )
    if as_json:
        click.echo(json.dumps(result))


cli.add_command(data)
cli.add_command(evaluate)
cli.add_command(extract)
cli.add_command(keys)
cli.add_command(models)
cli.add_command(serve)
cli.add_command(tune)
cli.add_command(ui)


def main() -> None:
    """Entry point of the `mimray` command."""
    cli(prog_name="mimray")


if __name__ == "__main__":
    main()
