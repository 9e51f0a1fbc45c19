"""`mimray models`: the group of commands on the registry of bundles."""

from __future__ import annotations

import click

from mimray.service.cli.options import json_option, print_result

storage_option = click.option(
    "--storage", default="runs", show_default=True, help="Where runs are tracked."
)


@click.group()
def models() -> None:
    """Registered encoders: register, list, show, alias, add-head."""


@models.command("register")
@click.argument("bundle", metavar="BUNDLE|SWEEP:best|SWEEP:N")
@click.option("--name", required=True, help="Name of the model.")
@click.option("--alias", default=None, help="To point at it, e.g. champion.")
@storage_option
@json_option
def register(bundle: str, name: str, alias: str | None, storage: str, as_json: bool) -> None:
    """Put a run's, a bundle's or a sweep's encoder under a name.

    A sweep is given by name or directory, its best trial by `:best`, any other by its number.

    Example: mimray models register mae-mask-depth:best --name photos --alias champion
    """
    from mimray.service.commands.models import register_model, version_text

    print_result(register_model(bundle, name, alias, storage), as_json, version_text)


@models.command("list")
@click.argument("name", required=False)
@storage_option
@json_option
def list_(name: str | None, storage: str, as_json: bool) -> None:
    """List all versions, or those of one model.

    Example: mimray models list
    """
    from mimray.service.commands.models import list_models, versions_text

    found = list_models(name, storage)
    if not found and not as_json:
        click.echo("no model yet: `mimray models register RUN --name NAME`", err=True)
        return
    print_result(found, as_json, versions_text)


@models.command("show")
@click.argument("reference")
@storage_option
@json_option
def show(reference: str, storage: str, as_json: bool) -> None:
    """Show one version: NAME, NAME@ALIAS or NAME@vN.

    Example: mimray models show photos@champion
    """
    from mimray.service.commands.models import show_model, version_text

    print_result(show_model(reference, storage), as_json, version_text)


@models.command("alias")
@click.argument("reference")
@click.argument("alias")
@storage_option
@json_option
def alias(reference: str, alias: str, storage: str, as_json: bool) -> None:
    """Point an alias at a version, whatever it pointed at before.

    Example: mimray models alias photos@v2 champion
    """
    from mimray.service.commands.models import set_alias, version_text

    print_result(set_alias(reference, alias, storage), as_json, version_text)


@models.command("add-head")
@click.argument("reference")
@click.argument("folder")
@click.option("--name", default=None, help="Name of the head; the folder's by default.")
@storage_option
@json_option
def add_head(reference: str, folder: str, name: str | None, storage: str, as_json: bool) -> None:
    """Register a trained head with the encoder that it was trained on; `serve` answers by it.

    Example: mimray models add-head photos@v2 runs/photos/evaluation/segmentation --name scenes
    """
    from mimray.service.commands.models import add_head as add
    from mimray.service.commands.models import version_text

    print_result(add(reference, folder, name, storage), as_json, version_text)
