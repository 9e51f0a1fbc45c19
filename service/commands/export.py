"""`mimray export`: the frozen encoder of a run, as a bundle or for other libraries."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from mimray.service.terminal.console import warn
from mimray.trainers.errors import BundleError, ConfigError

if TYPE_CHECKING:
    from mimray.trainers.engine.average import Weights
    from mimray.trainers.storage import RunDir


RAW = "bundle-raw"
"""The folder, in a run that keeps an average, of its weights as trained."""


def export_run(
    run: str,
    out: Path | None,
    kind: str,
    weights: str | None = None,
    *,
    image_size: tuple[int, int] | None = None,
    layers: tuple[int, ...] | None = None,
) -> str:
    """Export an encoder; makes the run's own bundle first where training was cut short.

    Args:
        run: a run's or a bundle's path or URI.
        out: the folder to write; None leaves a bundle in the run's directory.
        kind: `bundle`, `timm`, `transformers` or `onnx`.
        weights: `average` or `raw`, of a run that keeps an average beside its weights; None for
            those of its bundle.
        image_size: (height, width) of the input of an ONNX graph, pixels; as trained by default.
        layers: layers whose maps are outputs of an ONNX graph; the bundle's by default.

    Returns:
        A line that says what is where.

    Raises:
        BundleError: there is nothing to export, or no place to write to.
    """
    from mimray.trainers.bundles import CARD, bundle_place, fetch_bundle, read_card
    from mimray.trainers.convert import export_onnx, export_timm, export_transformers
    from mimray.trainers.storage import RunDir

    if kind != "onnx" and (image_size is not None or layers is not None):
        raise ConfigError("--image-size and --layers go with --format onnx")
    run_dir = RunDir(run)
    if run_dir.exists("plan.json") and not run_dir.exists(f"bundle/{CARD}"):
        _bundle_from_checkpoint(run_dir)
    run = _with_weights(run, weights)
    for warning in read_card(fetch_bundle(run)).warnings:
        warn(warning)
    if kind == "bundle":
        if out is None:
            return f"{bundle_place(run)}: bundle"
        return _copy_bundle(fetch_bundle(run), out)
    if out is None:
        raise BundleError(f"--format {kind} needs a place to write to", hint="export RUN OUT")
    exporters: dict[str, Callable[[Path, Path], str]] = {
        "timm": export_timm,
        "transformers": export_transformers,
        "onnx": partial(export_onnx, size=image_size, layers=layers),
    }
    return f"{out}: {kind}, {exporters[kind](fetch_bundle(run), out)}"


def _with_weights(run: str, weights: str | None) -> str:
    """The place of the bundle with the weights that are asked for, made where that is possible."""
    from mimray.trainers.bundles import fetch_bundle, read_card
    from mimray.trainers.storage import RunDir

    if weights is None or read_card(fetch_bundle(run)).weights == weights:
        return run
    if weights == "average":
        raise BundleError(
            f"{run} holds weights as they were trained, and no average of them",
            hint="`pretrain --set optim.ema=0.999` keeps one",
        )
    run_dir = RunDir(run)
    if not run_dir.exists("plan.json"):
        raise BundleError(
            f"{run} is a bundle of averaged weights alone",
            hint="its run has the others: `mimray export RUN --weights raw`",
        )
    _bundle_from_checkpoint(run_dir, "raw", RAW)
    return (run_dir / RAW).uri


def _bundle_from_checkpoint(
    run: RunDir, weights: Weights = "average", folder: str = "bundle"
) -> None:
    from mimray.trainers.config.run import parse_plan
    from mimray.trainers.engine.checkpoints import newest_whole
    from mimray.trainers.engine.export import read_checkpoint, write_bundle

    checkpoint = newest_whole(run)
    if checkpoint is None:
        raise BundleError(
            f"{run} has no checkpoint yet", hint="let it reach checkpoint.every_steps"
        )
    hint = "the version of mimray that began the run can export it"
    plan = parse_plan(run.read("plan.json"), f"{run}/plan.json", hint)
    with TemporaryDirectory(prefix="mimray-") as scratch:
        (run / f"checkpoints/{checkpoint.name}").download(Path(scratch))
        state = read_checkpoint(run, Path(scratch), checkpoint, plan)
    write_bundle(
        run,
        plan,
        state,
        step=checkpoint.step,
        name=run.name,
        command=f"mimray export {run}" + (" --weights raw" if weights == "raw" else ""),
        weights=weights,
        folder=folder,
    )


def _copy_bundle(folder: Path, out: Path) -> str:
    if out.exists():
        raise BundleError(f"{out} exists", hint="choose another place")
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, out)
    return f"{out}: bundle"
