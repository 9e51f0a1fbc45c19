"""The commands that say what an encoder is worth."""

from __future__ import annotations

import json
from typing import Any

import click

from mimray.service.cli.options import command_line, json_option, parse_size
from mimray.service.commands.tasks import TASKS


@click.command()
@click.argument("bundles", nargs=-1, metavar="BUNDLE…")
@click.option("--task", type=click.Choice(list(TASKS)), default="knn", show_default=True)
@click.option("--data", default=None, help="Pictures; labelled, but for rankme.")
@click.option("--val", default=None, help="Pictures to score on; default: DATA's own split.")
@click.option("--limit", type=click.IntRange(min=1), default=None, help="N pictures of each only.")
@click.option("--epochs", type=click.IntRange(min=1), default=None, help="Length of the training.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="An option of TASK.")
@click.option("--options", "show_options", is_flag=True, help="List the options of TASK.")
@click.option(
    "--image-size", default=None, metavar="N|HxW", help="Input of untrained:ARCH, pixels."
)
@click.option("--finetune", is_flag=True, help="Dense tasks: train the encoder with the head.")
@click.option("--through", default=None, metavar="URL", help="An endpoint; BUNDLE is its model.")
@click.option("--skip-invalid", is_flag=True, help="Leave out wrong labels and list them.")
@click.option("--compare", is_flag=True, help="One table and one chart of all BUNDLEs.")
@click.option("--out", default=None, help="Where results go; beside each bundle by default.")
@json_option
def evaluate(
    bundles: tuple[str, ...],
    task: str,
    data: str | None,
    val: str | None,
    limit: int | None,
    epochs: int | None,
    seed: int,
    overrides: tuple[str, ...],
    show_options: bool,
    image_size: str | None,
    finetune: bool,
    through: str | None,
    skip_invalid: bool,
    compare: bool,
    out: str | None,
    as_json: bool,
) -> None:
    """Score an encoder by a task.

    BUNDLE is a run or a bundle; `untrained:RUN` is a fresh encoder of the same shape and
    `untrained:vit_tiny` one of a published shape: what a score must beat.

    \b
    knn, linear    pictures in class folders or Parquet with labels
    finetune       the same; the whole encoder learns
    rankme         any pictures, no labels: the effective rank of the features, a proxy
    segmentation   pictures with index masks, or COCO panoptic or instance files
    detection      COCO JSON or Pascal VOC

    Example: mimray evaluate runs/mae-tiny --task segmentation --data scenes
    """  # noqa: D301 (click wants the character)
    from mimray.service.commands.evaluate import Request, run_evaluate, summary

    if show_options:
        _print_options(task, as_json)
        return
    if not bundles:
        raise click.UsageError("Missing argument 'BUNDLE…'.")
    if data is None:
        raise click.UsageError("Missing option '--data'.")
    if len(bundles) > 1 and not compare:
        raise click.UsageError("several BUNDLEs go with --compare.")
    if finetune:
        overrides = (*overrides, "finetune=true")
    request = Request(
        task=task,
        data=data,
        val=val,
        limit=limit,
        epochs=epochs,
        seed=seed,
        overrides=overrides,
        image_size=parse_size(image_size) if image_size else None,
        through=through,
        skip_invalid=skip_invalid,
        out=None if compare else out,
        command=command_line(),
    )
    results = run_evaluate(bundles, request)
    if compare:
        _print_comparison(results, out or "runs/evaluation", as_json)
        return
    result = results[0]
    if as_json:
        click.echo(json.dumps(result))
        return
    for note in result["notes"]:
        click.echo(f"note: {note}", err=True)
    click.echo(summary(result))
    for name, value in result["metrics"].items():
        if isinstance(value, float):
            click.echo(f"  {name:24} {value:.4f}")
    click.echo("\n".join([f"{result['folder']}/{task}.json", *result["pictures"]]))


def _print_comparison(results: list[dict[str, Any]], out: str, as_json: bool) -> None:
    from mimray.service.commands.compare import table, write_comparison

    files = write_comparison(results, out)
    if as_json:
        click.echo(json.dumps({"results": results, "files": files}))
        return
    click.echo(table(results))
    click.echo(files["png"])


def _print_options(task: str, as_json: bool) -> None:
    from mimray.trainers.evaluation.tasks import options_of

    options = options_of(TASKS[task])
    if as_json:
        click.echo(json.dumps(options, default=str))
        return
    for option in options:
        click.echo(f"{option['key']} = {json.dumps(option['default'], default=str)}")
        if option["description"]:
            click.echo(f"    {option['description']}")


def _layers(ctx: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(layer) for layer in text.split(",")) if text else ()
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of layers such as 2,5,8,11") from None


@click.command()
@click.argument("bundle")
@click.argument("data")
@click.argument("out")
@click.option("--split", default=None, help="Of DATA; train by default, where there are several.")
@click.option(
    "--pooled",
    multiple=True,
    type=click.Choice(["mean", "cls"]),
    help="One vector a picture; mean where nothing else is asked for.",
)
@click.option("--layers", default=None, callback=_layers, metavar="I,J,…", help="Feature maps.")
@click.option("--tokens", is_flag=True, help="The patch tokens.")
@click.option("--norm/--no-norm", default=True, help="Apply the final norm to feature maps.")
@click.option(
    "--dtype", type=click.Choice(["float16", "float32"]), default="float32", show_default=True
)
@click.option("--limit", type=click.IntRange(min=1), default=None, help="N pictures, spread out.")
@click.option("--image-size", default=None, metavar="N|HxW", help="Pixels; the bundle's own.")
@click.option(
    "--part-pictures",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Most pictures in a file; what a kill can cost.",
)
@click.option("--skip-invalid", is_flag=True, help="Leave out broken pictures and list them.")
@json_option
def extract(
    bundle: str,
    data: str,
    out: str,
    split: str | None,
    as_json: bool,
    image_size: str | None,
    **kept: Any,
) -> None:
    """Write an encoder's features of a dataset as Parquet.

    Run again after a kill, the same command writes what is missing. Features are tensors of one
    shape a column, beside `id`, `index` and `label`; OUT/extraction.json says what they are.

    Example: mimray extract runs/mae-tiny pictures features --layers 2,5,8,11 --dtype float16
    """
    from mimray.service.commands.extract import run_extract
    from mimray.trainers.config.evaluation.extract import ExtractSpec

    if not (kept["pooled"] or kept["layers"] or kept["tokens"]):
        kept["pooled"] = ("mean",)
    spec = ExtractSpec(image_size=parse_size(image_size) if image_size else None, **kept)
    result = run_extract(bundle, data, out, spec, split=split)
    if as_json:
        click.echo(json.dumps(result))
