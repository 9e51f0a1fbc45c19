"""`mimray export`."""

from __future__ import annotations

from pathlib import Path

import click

from mimray.service.cli.options import image_size, layer_list


@click.command()
@click.argument("run")
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["bundle", "timm", "transformers", "onnx"]),
    default="bundle",
    show_default=True,
)
@click.option(
    "--weights",
    type=click.Choice(["average", "raw"]),
    help="Of a run with optim.ema: the average, as its bundle has it, or the weights as trained.",
)
@click.option(
    "--image-size",
    callback=image_size,
    metavar="N|HxW",
    help="Input of an ONNX graph, pixels; as trained by default.",
)
@click.option(
    "--layers",
    default=None,
    callback=layer_list,
    metavar="I,J,…",
    help="Maps that an ONNX graph gives; the bundle's by default.",
)
def export(
    run: str,
    out: Path | None,
    kind: str,
    weights: str | None,
    image_size: tuple[int, int] | None,
    layers: tuple[int, ...] | None,
) -> None:
    """Write a run's frozen encoder as a bundle, or for timm, transformers or ONNX runtimes.

    Without OUT a bundle goes into the run's own directory, from its newest checkpoint; raw weights
    beside an average go into bundle-raw/. An ONNX graph comes in Triton's layout, with a
    certificate of how close it is to torch on photographs; its encoder takes batches of any number.

    Example: mimray export runs/mae-tiny exported --format timm
    """
    from mimray.service.commands.export import export_run

    click.echo(export_run(run, out, kind, weights, image_size=image_size, layers=layers or None))
