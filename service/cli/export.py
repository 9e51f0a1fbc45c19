"""`mimray export`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run")
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["bundle", "timm", "transformers"]),
    default="bundle",
    show_default=True,
)
@click.option(
    "--weights",
    type=click.Choice(["average", "raw"]),
    help="Of a run with optim.ema: the average, as its bundle has it, or the weights as trained.",
)
def export(run: str, out: Path | None, kind: str, weights: str | None) -> None:
    """Write a run's frozen encoder as a bundle, or for timm or transformers.

    Without OUT a bundle goes into the run's own directory, from its newest checkpoint; raw weights
    beside an average go into bundle-raw/.

    Example: mimray export runs/mae-tiny exported --format timm
    """
    from mimray.service.commands.export import export_run

    click.echo(export_run(run, out, kind, weights))
