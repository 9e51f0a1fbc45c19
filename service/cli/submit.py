"""`mimray submit`."""

from __future__ import annotations

import click

from mimray.service.cli.options import json_option, print_result


@click.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "--address",
    default=None,
    help="The cluster's dashboard, http://host:8265; by default that of RAY_API_SERVER_ADDRESS or "
    "RAY_ADDRESS, or this machine's.",
)
@click.option(
    "--working-dir",
    default=None,
    help="Code to ship, path or URI; by default the checkout that this command runs from, and "
    "nothing where it is installed.",
)
@click.option("--id", "name", default=None, help="Name of the job; by default told by COMMAND.")
@click.option("--detach", is_flag=True, help="Return once it is submitted.")
@click.option("--again", is_flag=True, help="Submit anew what has succeeded already.")
@json_option
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def submit(
    address: str | None,
    working_dir: str | None,
    name: str | None,
    detach: bool,
    again: bool,
    as_json: bool,
    command: tuple[str, ...],
) -> None:
    """Run `mimray COMMAND` as a job on a cluster, and follow its log.

    The same COMMAND again follows the job that runs, or goes on with one that has failed. Ctrl-C
    leaves the job running.

    Example: mimray submit -- pretrain mae-tiny --data s3://bucket/photos --storage s3://bucket/runs
    """
    from mimray.service.commands.submit import run_submit

    result = run_submit(
        command, address=address, working_dir=working_dir, name=name, detach=detach, again=again
    )
    print_result(result, as_json)
    if result["status"] in ("FAILED", "STOPPED"):
        raise SystemExit(result["exit_code"] or 1)
