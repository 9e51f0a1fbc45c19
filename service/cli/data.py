"""`mimray data`: the group of commands on datasets."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import click

from mimray.service.cli.options import image_size, json_option, label_option, print_result


def _value_range(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[float, float] | None:
    if value is None:
        return None
    try:
        low, high = map(float, value.split(":"))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not LOW:HIGH, e.g. 0:4095") from None
    if not -math.inf < low < high < math.inf:
        raise click.BadParameter(f"{value!r}: LOW must be less than HIGH")
    return low, high


def _bands(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    if value is None:
        return None
    bands = value.split(",")
    if len(bands) not in (1, 3) or not all(band.strip().isdecimal() for band in bands):
        raise click.BadParameter(f"{value!r} is not three numbers, e.g. 4,3,2, or one")
    numbers = tuple(map(int, bands))
    if 0 in numbers:
        raise click.BadParameter(f"{value!r}: bands are numbered from 1")
    return numbers


@click.group()
def data() -> None:
    """Datasets: ingest, inspect, sample, synth."""


@data.command("ingest")
@click.argument("src")
@click.argument("out")
@click.option("--short-side", default=256, show_default=True, help="Pixels; 0 keeps the size.")
@click.option("--shard-mib", default=64, show_default=True, type=click.IntRange(min=1))
@click.option("--max-rejected", default=0.01, show_default=True, type=click.FloatRange(0, 1))
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
@click.option("--split", metavar="NAME", default=None, help="This split alone; all by default.")
@click.option(
    "--range",
    "value_range",
    metavar="LOW:HIGH",
    callback=_value_range,
    help="Values that become black and white in gray of more than 8 bits and in --bands, e.g. "
    "0:4095 for 12 bits.",
)
@click.option(
    "--bands",
    metavar="R,G,B",
    callback=_bands,
    help="Bands of TIFFs, from 1, as red, green and blue; or one, as gray.",
)
@click.option(
    "--pages",
    type=click.Choice(("first", "all")),
    default="first",
    show_default=True,
    help="Pages of a TIFF that are taken.",
)
@label_option
@json_option
def data_ingest(
    src: str,
    out: str,
    short_side: int,
    shard_mib: int,
    max_rejected: float,
    overwrite: bool,
    split: str | None,
    value_range: tuple[float, float] | None,
    bands: tuple[int, ...] | None,
    pages: str,
    label: str | None,
    as_json: bool,
) -> None:
    """Verify pictures and write them as Parquet.

    SRC is a folder (class folders give labels), Parquet, or a text file of URIs. Splits (train,
    val, test) are written to a folder each.

    Example: mimray data ingest pictures dataset --short-side 256
    """
    from mimray.service.commands.data import run_ingest
    from mimray.trainers.data.decode import Reading

    result = run_ingest(
        src,
        out,
        short_side_px=short_side or None,
        shard_mib=shard_mib,
        max_rejected=max_rejected,
        overwrite=overwrite,
        split=split,
        reading=Reading(value_range, bands),
        every_page=pages == "all",
        label=label,
    )
    print_result(result, as_json)


@data.command("inspect")
@click.argument("uri")
@click.option("--sheet", type=click.Path(dir_okay=False, path_type=Path), help="Contact sheet PNG.")
@label_option
@json_option
def data_inspect(uri: str, sheet: Path | None, label: str | None, as_json: bool) -> None:
    """Count a dataset's pictures, sizes and labels; draw a contact sheet.

    Example: mimray data inspect dataset --sheet sheet.png
    """
    from mimray.service.commands.data import inspection_text, run_inspect

    print_result(run_inspect(uri, sheet, label), as_json, partial(inspection_text, sheet=sheet))


@data.command("sample")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--size", default=64, show_default=True, help="Side of a tile, pixels.")
def data_sample(out: Path, size: int) -> None:
    """Write tiles of the photographs that come with the installation, train and val.

    Example: mimray data sample photos
    """
    from mimray.trainers.data.sample_photos import write_photo_tiles

    train, val = write_photo_tiles(out, size_px=size)
    click.echo(f"{train}\n{val}")


@data.command("synth")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--num-train", default=64, show_default=True, type=click.IntRange(min=1))
@click.option("--num-val", default=32, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--image-size",
    default="96",
    show_default=True,
    callback=image_size,
    metavar="N|HxW",
    help="Pixels.",
)
@click.option("--classes", default=5, show_default=True, help="Shapes that occur.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--overwrite", is_flag=True, help="Replace an earlier set at OUT.")
@json_option
def data_synth(
    out: Path,
    num_train: int,
    num_val: int,
    image_size: tuple[int, int],
    classes: int,
    seed: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Draw scenes with every kind of label: classes, boxes, instance and semantic masks.

    Textured shapes on photographs, as COCO JSON, COCO panoptic, index PNGs and class folders.

    Example: mimray data synth scenes
    """
    from mimray.trainers.data.synth import write_scenes

    train, val = write_scenes(
        out,
        num_train=num_train,
        num_val=num_val,
        image_size=image_size,
        num_classes=classes,
        seed=seed,
        overwrite=overwrite,
    )
    splits = {"train": str(train), "val": str(val)}
    print_result(splits, as_json, lambda found: "\n".join(found.values()))
