"""`mimray doctor`."""

from __future__ import annotations

import click

from mimray.service.cli.options import json_option


@click.command()
@click.option("--storage", default="runs", show_default=True, help="Where runs would be kept.")
@click.option("--cluster", is_flag=True, help="Check the nodes of a Ray cluster that runs.")
@click.option("--run", "name", default=None, metavar="NAME", help="Say where a run stands.")
@click.option(
    "--address",
    default=None,
    help="The cluster's address, host:port or ray://…; by default RAY_ADDRESS, this machine's, or "
    "with --run the one it was launched on.",
)
@json_option
@click.pass_context
def doctor(
    ctx: click.Context,
    storage: str,
    cluster: bool,
    name: str | None,
    address: str | None,
    as_json: bool,
) -> None:
    """Check this machine, a cluster or a run; each line says ok, or what to do.

    Example: mimray doctor
    """
    from mimray.service.commands.doctor import as_json as to_json
    from mimray.service.commands.doctor import diagnose, render

    if cluster and name is not None:
        raise click.UsageError("--cluster and --run ask for two different things")
    if address is not None and not cluster and name is None:
        raise click.UsageError("--address goes with --cluster or --run")
    if name is not None:
        from mimray.service.commands.doctor_run import diagnose_run

        diagnosis = diagnose_run(name, storage=storage, address=address)
        findings = diagnosis.findings
        click.echo(diagnosis.as_json() if as_json else render(findings))
    else:
        if cluster:
            from mimray.service.commands.doctor_cluster import diagnose_cluster

            findings = diagnose_cluster(storage=storage, address=address)
        else:
            findings = diagnose(storage=storage)
        click.echo(to_json(findings) if as_json else render(findings))
    if any(finding.status == "fail" for finding in findings):
        ctx.exit(2)
