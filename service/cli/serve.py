"""`mimray serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("bundles", nargs=-1, metavar="[[NAME=]BUNDLE[@ALIAS]…]")
@click.option(
    "--config", type=click.Path(path_type=Path), help="A serve.yaml; see docs/serving.md."
)
@click.option("--host", help="127.0.0.1 by default; a public one needs keys.")
@click.option("--port", type=click.IntRange(1, 65535), help="8000 by default.")
@click.option(
    "--keys",
    type=click.Path(path_type=str, resolve_path=True),
    help="File of `mimray keys`.",
)
@click.option("--replicas", type=click.IntRange(min=1), help="Processes a model; 1 by default.")
@click.option(
    "--max-batch-size", type=click.IntRange(min=1), help="Pictures a pass; 16 by default."
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]))
@click.option(
    "--canary",
    metavar="SHARE",
    help="Share of requests, e.g. 10%, for the version with the alias `canary`.",
)
@click.option(
    "--head",
    "heads",
    multiple=True,
    metavar="[MODEL:]NAME=FOLDER",
    help="A trained head to answer by, as `mimray evaluate` leaves it; may be given again.",
)
@click.option("--build", is_flag=True, help="Write what `serve deploy` takes instead of serving.")
@click.option("--out", type=click.Path(path_type=Path), help="Where --build writes; else stdout.")
def serve(
    bundles: tuple[str, ...],
    config: Path | None,
    canary: str | None,
    heads: tuple[str, ...],
    build: bool,
    out: Path | None,
    **options: Any,
) -> None:
    """Serve frozen encoders over HTTP until Ctrl-C: a page, features, OIP v2, embeddings.

    An alias is followed: where it moves to another version, that one is rolled in without a
    failed request. With keys, or MIMRAY_API_KEY set, requests need one as a bearer token.

    Trained heads turn features into answers at /v1/predict: classes, masks, boxes. Those that are
    registered with a model come by themselves.

    Example: mimray serve photos@champion --canary 10%
    """
    from mimray.service.commands.serve import run_serve, serve_config, write_build

    wanted = serve_config(bundles, config, canary, options, heads)
    if not build:
        run_serve(wanted)
        return
    text = write_build(wanted, out)
    if out is None:
        click.echo(text, nl=False)
