"""`mimray keys`: who may ask an endpoint."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mimray.service.cli.options import json_option

file_option = click.option(
    "--file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where keys are kept; MIMRAY_KEYS or ~/.config/mimray/keys.json by default.",
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

    place = file or default_file()
    key = add_key(place, name, pictures_per_minute=pictures_per_minute)
    click.echo(f"key {name!r}, kept as a hash in {place}; it is not shown again:", err=True)
    click.echo(key)


@keys.command("list")
@file_option
@json_option
def list_keys(file: Path | None, as_json: bool) -> None:
    """Names, dates and limits; the keys themselves are nowhere.

    Example: mimray keys list
    """
    from mimray.serving.api.keys import default_file, read_keys

    found = read_keys(file or default_file())
    if as_json:
        click.echo(json.dumps([key.model_dump(exclude={"sha256"}) for key in found]))
        return
    for key in found:
        rate = key.pictures_per_minute
        limit = f"{rate} pictures a minute" if rate else "no limit"
        click.echo(f"{key.name:24} {key.created:28} {limit}")
    if not found:
        click.echo("no keys", err=True)


@keys.command()
@click.argument("name")
@file_option
def revoke(name: str, file: Path | None) -> None:
    """Take a key away; running endpoints notice within a second.

    Example: mimray keys revoke detectors
    """
    from mimray.serving.api.keys import default_file, revoke_key

    place = file or default_file()
    revoke_key(place, name)
    click.echo(f"key {name!r} is gone from {place}", err=True)
