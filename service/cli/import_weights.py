"""`mimray import`."""

from __future__ import annotations

from pathlib import Path

import click

from mimray.service.cli.options import command_line, image_size, json_option, print_result


@click.command("import")
@click.argument("checkpoint")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--image-size",
    callback=image_size,
    metavar="N|HxW",
    help="Pixels; the weights' own by default.",
)
@click.option(
    "--as", "architecture", default=None, metavar="ARCH", help="timm's name of the model."
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="A.B=VALUE",
    help="Set a key that the weights leave open.",
)
@click.option("--partial", is_flag=True, help="Keep what fits, list what does not.")
@click.option("--name", default="", help="Name of the encoder; the checkpoint's by default.")
@click.option("--license", default="", help="Licence of the weights, e.g. cc-by-nc-4.0.")
@json_option
def import_(
    checkpoint: str,
    out: Path,
    image_size: tuple[int, int] | None,
    architecture: str | None,
    overrides: tuple[str, ...],
    partial: bool,
    name: str,
    license: str,
    as_json: bool,
) -> None:
    """Turn public weights into a bundle.

    CHECKPOINT is a file of the official MAE, BEiT, SimMIM, MaskFeat, DINOv2, DINOv3 or EVA-02
    code, a folder of timm or transformers, a bare file of timm's weights (--as says of what), or
    timm:NAME.

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
        license=license,
        command=command_line(),
    )
    print_result(result, as_json)
