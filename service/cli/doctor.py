"""`mimray doctor`."""

from __future__ import annotations

import click

from mimray.service.cli.options import json_option


@click.command()
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
    if any(finding.status == "fail" for finding in findings):
        ctx.exit(2)
