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
def export(run: str, out: Path | None, kind: str) -> None:
    """Write a run's frozen encoder as a bundle, or for timm or transformers.

    Without OUT a bundle goes into the run's own directory, from its newest checkpoint.

    Example: mimray export runs/mae-tiny exported --format timm
    """
    from mimray.service.commands.export import export_run

    click.echo(export_run(run, out, kind))
