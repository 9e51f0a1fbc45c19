"""`mimray keys`: the group of commands on an endpoint's API keys."""

from __future__ import annotations

from pathlib import Path

import click

from mimray.service.cli.options import json_option, print_result

file_option = click.option(
    "--file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File of the keys; MIMRAY_KEYS or ~/.config/mimray/keys.json by default.",
)


@click.group()
def keys() -> None:
    """API keys of endpoints: named, kept as hashes, added and revoked while they run.

    Example: mimray keys add detectors
    """


@keys.command()
@click.argument("name")
@click.option(
    "--pictures-per-minute",
    type=click.IntRange(min=1),
    help="Most a replica answers for this key; no limit by default.",
)
@file_option
def add(name: str, pictures_per_minute: int | None, file: Path | None) -> None:
    """Make a key and print it, this once.

    Example: mimray keys add detectors --pictures-per-minute 600
    """
    from mimray.serving.api.keys import add_key, default_file

    file = file or default_file()
    key = add_key(file, name, pictures_per_minute=pictures_per_minute)
    click.echo(f"key {name!r}, kept as a hash in {file}; it is not shown again:", err=True)
    click.echo(key)


@keys.command("list")
@file_option
@json_option
def list_keys(file: Path | None, as_json: bool) -> None:
    """List names, dates and limits; the keys themselves are not kept.

    Example: mimray keys list
    """
    from mimray.service.commands.keys import keys_table, known_keys

    found = known_keys(file)
    if not found and not as_json:
        click.echo("no keys", err=True)
        return
    print_result(found, as_json, keys_table)


@keys.command()
@click.argument("name")
@file_option
def revoke(name: str, file: Path | None) -> None:
    """Take a key away; running endpoints notice within a second.

    Example: mimray keys revoke detectors
    """
    from mimray.serving.api.keys import default_file, revoke_key

    file = file or default_file()
    revoke_key(file, name)
    click.echo(f"key {name!r} is gone from {file}", err=True)
