"""Putting encoders behind HTTP from the command line."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from trainers.errors import ServingError

console = Console(stderr=True, highlight=False, soft_wrap=True)


def parse_models(bundles: Sequence[str]) -> dict[str, Path]:
    """`NAME=BUNDLE` or `BUNDLE` (named after its card) as bundles by name, on this machine.

    Raises:
        ServingError: two bundles of one name.
        BundleError: a bundle that is not one.
    """
    from trainers.bundles import fetch_bundle, read_card
    from trainers.registry import locate, registered

    models: dict[str, Path] = {}
    for item in bundles:
        name, equals, path = item.partition("=")
        if not equals or "/" in name:  # `=` also stands in paths and in the options of a URI
            path, name = item, ""
        folder = fetch_bundle(locate(path))
        # A registered model is served under its own name, whatever version it is.
        name = name or (path.partition("@")[0] if registered(path) else read_card(folder).name)
        if name in models:
            raise ServingError(
                f"two models are named {name!r}", hint="NAME=BUNDLE names them apart"
            )
        models[name] = folder
    return models


def run_serve(bundles: Sequence[str], **options: Any) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    models = parse_models(bundles)

    from serving.run import serve_bundles

    logging.getLogger("ray").setLevel(logging.ERROR)
    console.print("starting…", markup=False)
    with serve_bundles(models, **options) as endpoint:
        console.print(f"serving {', '.join(endpoint.models)} at {endpoint.url}; Ctrl-C ends it")
        for name in endpoint.models:
            console.print(f"  POST {endpoint.url}/v2/models/{name}/infer", markup=False)
        endpoint.wait()
    console.print("stopped", markup=False)
