"""`mimray extract`."""

from __future__ import annotations

from typing import Any

import click

from mimray.service.cli.options import (
    image_size,
    json_option,
    label_option,
    layer_list,
    print_result,
)


@click.command()
@click.argument("bundle")
@click.argument("data")
@click.argument("out")
@click.option(
    "--split", default=None, help="Split of DATA; train by default, where there are several."
)
@click.option(
    "--pooled",
    multiple=True,
    type=click.Choice(["mean", "cls"]),
    help="One vector a picture; mean where nothing else is asked for.",
)
@click.option("--layers", default=None, callback=layer_list, metavar="I,J,…", help="Feature maps.")
@click.option("--tokens", is_flag=True, help="The patch tokens.")
@click.option("--norm/--no-norm", default=True, help="Apply the final norm to feature maps.")
@click.option(
    "--dtype", type=click.Choice(["float16", "float32"]), default="float32", show_default=True
)
@click.option(
    "--limit", type=click.IntRange(min=1), default=None, help="N pictures only, evenly spread."
)
@click.option(
    "--image-size",
    callback=image_size,
    metavar="N|HxW",
    help="Pixels; the bundle's own by default.",
)
@click.option(
    "--part-pictures",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Most pictures in a file; a kill loses unfinished files.",
)
@click.option("--skip-invalid", is_flag=True, help="Leave out broken pictures and list them.")
@label_option
@json_option
def extract(
    bundle: str,
    data: str,
    out: str,
    split: str | None,
    label: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Write an encoder's features of a dataset as Parquet.

    Run again after a kill, the same command writes what is missing. Features are tensors of one
    shape a column, beside `id`, `index` and `label`; OUT/extraction.json says what they are.

    Example: mimray extract runs/mae-tiny pictures features --layers 2,5,8,11 --dtype float16
    """
    from mimray.service.commands.extract import check_spec, run_extract

    result = run_extract(bundle, data, out, check_spec(options), split=split, label=label)
    print_result(result, as_json)
