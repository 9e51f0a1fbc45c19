"""`mimray ui`."""

from __future__ import annotations

import click


@click.command()
@click.option("--sweep", default=None, metavar="NAME", help="Also open this sweep's study.")
@click.option("--storage", default="runs", show_default=True, help="Where runs are tracked.")
@click.option("--port", default=5000, show_default=True, type=click.IntRange(1, 65534))
def ui(sweep: str | None, storage: str, port: int) -> None:
    """Open MLflow, and with --sweep optuna-dashboard, on 127.0.0.1 until Ctrl-C.

    Example: mimray ui --sweep mae-mask-depth
    """
    from mimray.service.commands.ui import run_ui

    run_ui(storage, sweep, port)
