"""The commands of the registry: names, versions and aliases of bundles."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mimray.service.cli.options import json_option

if TYPE_CHECKING:
    from mimray.trainers.registry import Version

storage_option = click.option(
    "--storage", default="runs", show_default=True, help="Where runs are tracked."
)


@click.group()
def models() -> None:
    """Registered encoders: register, list, show, alias."""


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
    from mimray.trainers.registry import Registry
    from mimray.trainers.storage import RunDir
    from mimray.tuning.record import find_trial, trial_dir

    lineage: dict[str, str] = {}
    if not Path(bundle).exists() and "://" not in bundle.rpartition(":")[2]:
        found = find_trial(bundle, storage)
        if found is not None:
            sweep, trial = found
            bundle = trial_dir(RunDir(sweep.uri), trial.number).uri
            lineage = {
                "sweep": sweep.uri,
                "trial": trial.name,
                "params": json.dumps(trial.params),
                "sweep_score": f"{sweep.metric} {trial.score}",
            }
    version = Registry.open(storage).register(bundle, name, alias, lineage)
    _print(version, as_json)


@models.command("list")
@click.argument("name", required=False)
@storage_option
@json_option
def list_(name: str | None, storage: str, as_json: bool) -> None:
    """List all versions, or those of one model.

    Example: mimray models list
    """
    from mimray.trainers.registry import Registry

    versions = Registry.open(storage).versions(name)
    if as_json:
        click.echo(json.dumps([_row(version) for version in versions]))
        return
    if not versions:
        click.echo("no model yet: `mimray models register RUN --name NAME`", err=True)
    for version in versions:
        scores = "  ".join(f"{t} {s['headline']:.4f}" for t, s in version.scores.items())
        aliases = "".join(f" @{alias}" for alias in version.aliases)
        click.echo(f"{version.reference}{aliases}  {version.facts['method']}  {scores}".rstrip())


@models.command("show")
@click.argument("reference")
@storage_option
@json_option
def show(reference: str, storage: str, as_json: bool) -> None:
    """Show one version: NAME, NAME@ALIAS or NAME@vN.

    Example: mimray models show photos@champion
    """
    from mimray.trainers.registry import Registry

    _print(Registry.open(storage).find(reference), as_json)


@models.command("alias")
@click.argument("reference")
@click.argument("alias")
@storage_option
@json_option
def alias(reference: str, alias: str, storage: str, as_json: bool) -> None:
    """Point an alias at a version, whatever it pointed at before.

    Example: mimray models alias photos@v2 champion
    """
    from mimray.trainers.registry import Registry

    _print(Registry.open(storage).alias(reference, alias), as_json)


def _print(version: Version, as_json: bool) -> None:
    row = _row(version)
    if as_json:
        click.echo(json.dumps(row))
        return
    for key, value in row.items():
        if key == "scores":
            for task, score in value.items():
                click.echo(f"{task:16} {score['metric']} {score['headline']:.4f}")
        elif value:
            click.echo(f"{key:16} {' '.join(value) if isinstance(value, list) else value}")


def _row(version: Version) -> dict[str, Any]:
    return {
        "model": version.reference,
        "name": version.name,
        "version": version.number,
        "aliases": list(version.aliases),
        "registered": time.strftime("%Y-%m-%d %H:%M", time.localtime(version.created_ms / 1000)),
        **version.facts,
        "scores": version.scores,
        "mlflow_run": version.run_id,
    }
