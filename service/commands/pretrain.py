"""What the commands do, one function a command; each returns what `--json` prints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from mimray.service.cluster import connected
from mimray.service.terminal.progress import CountingProgress, TrainingProgress, duration
from mimray.trainers.errors import BundleError

if TYPE_CHECKING:
    pass

console = Console(stderr=True, highlight=False, soft_wrap=True)


def run_pretrain(
    recipe: str,
    *,
    data: str,
    name: str,
    storage: str,
    steps: int | None,
    overrides: Sequence[str],
    fresh: bool,
    command: str,
) -> dict[str, Any]:
    """Check everything that can be checked, then start workers and train."""
    from mimray.trainers.config.advice import advice
    from mimray.trainers.config.recipes import load_recipe

    checked = load_recipe(recipe, overrides, steps)

    from mimray.trainers.launch import Job, finished, prepare, pretrain

    job = Job(checked, data, name, storage, fresh, command)
    plan = prepare(job)
    console.print(
        f"{job.run}: {recipe}, {plan.data.num_samples} pictures, {plan.steps} steps "
        f"({plan.steps / plan.steps_per_epoch:.2f} epochs), peak lr {plan.lr:.3g}",
        markup=False,
    )
    console.print(plan.batch_arithmetic, markup=False)
    for warning in advice(plan):
        console.print(f"warning: {warning}", style="yellow", markup=False)
    if "/_ray_pkg_" in job.run.uri:  # where `ray job submit --working-dir` unpacks
        console.print(
            "warning: this --storage lies in the job's own copy of the code, which Ray deletes; "
            "give an absolute path that every node sees, or s3://…",
            markup=False,
        )
    outcome = finished(job, plan)
    already_done = outcome is not None
    if outcome is None:
        began = time.monotonic()
        with connected(), TrainingProgress(plan.steps, console) as progress:
            outcome = pretrain(job, plan, progress)
        _draw_loss(job.run)
        console.print(f"trained in {duration(time.monotonic() - began)}", markup=False)
    else:
        console.print(f"{job.run} is finished already; --fresh starts over", markup=False)
    last = outcome.last
    console.print(f"loss {last['loss']:.4f} after {last['step']} steps", markup=False)
    console.print(f"bundle in {job.run / 'bundle'}", markup=False)
    return {
        "run": str(job.run),
        "bundle": str(job.run / "bundle"),
        "plan_hash": plan.hash,
        "global_batch": plan.global_batch,
        "already_done": already_done,
        **last,
    }


def run_ingest(src: str, out: str, **options: Any) -> dict[str, Any]:
    """Ingest on the cluster, with progress."""
    from mimray.trainers.data.ingest import ingest

    began = time.monotonic()
    with connected(), CountingProgress("ingesting", "pictures", console) as progress:
        report = ingest(src, out, progress=progress, **options)
    manifest = report.manifest
    console.print(
        f"{report.out}: {manifest.num_samples} pictures"
        + (f" of {len(manifest.class_names)} classes" if manifest.class_names else "")
        + f" in {len(manifest.shards)} shards, {manifest.image_bytes / 2**20:.1f} MiB, "
        f"{manifest.num_reencoded} re-encoded, {report.num_rejected} rejected, "
        f"{duration(time.monotonic() - began)}",
        markup=False,
    )
    if report.num_rejected:
        counts = ", ".join(f"{n} {reason}" for reason, n in manifest.rejected.items())
        console.print(f"rejected: {counts}; listed in {report.out}/rejected.jsonl", markup=False)
    return {
        "out": report.out,
        "num_samples": manifest.num_samples,
        "class_names": list(manifest.class_names),
        "fingerprint": manifest.fingerprint,
        "num_rejected": report.num_rejected,
        "rejected": manifest.rejected,
    }


def run_inspect(uri: str, sheet: Path | None, *, as_json: bool) -> str:
    """What a dataset is, as text or JSON."""
    from mimray.trainers.data.inspect import inspect

    found = inspect(uri, contact_sheet=sheet)
    if as_json:
        return json.dumps(asdict(found))
    facts = found.facts
    lines = [
        f"{facts.uri}: {facts.num_samples} pictures ({facts.kind}), "
        f"{found.num_bytes / 2**20:.1f} MiB, fingerprint {facts.fingerprint[:16]}"
    ]
    for what, span in (("width", found.width), ("height", found.height)):
        if span is not None:
            lines.append(
                f"{what:8} {span.smallest} to {span.largest} px, median {span.median} "
                f"({found.num_measured} measured)"
            )
    if found.num_broken:
        lines.append(f"broken   {found.num_broken} of the pictures looked at")
    if len(found.splits) > 1:
        lines.append(f"splits   {', '.join(found.splits)}")
    if found.label_counts is None:
        lines.append("labels   none")
    else:
        lines.append(f"labels   {len(found.label_counts)} classes")
        lines += [f"  {n:7} {name}" for name, n in found.label_counts.items()]
    if sheet is not None:
        lines.append(f"sheet    {sheet}")
    return "\n".join(lines)


def draw_reconstructions(
    run: str,
    pictures: Sequence[str],
    out: Path,
    *,
    mask_ratio: float | None,
    seed: int,
    oracle: bool,
) -> int:
    """Draw what a method makes of pictures, column by column; returns how many."""
    from mimray.trainers.bundles import fetch_bundle
    from mimray.trainers.data.decode import decode_rgb
    from mimray.trainers.errors import DataError
    from mimray.trainers.methods.load import load_method
    from mimray.trainers.methods.reconstruction import reconstruct
    from mimray.trainers.pictures import panel_sheet

    method = load_method(fetch_bundle(run))
    for name in pictures:
        if not Path(name).is_file():
            raise DataError(f"no picture at {name}")
    images = [decode_rgb(Path(name).read_bytes()) for name in pictures]
    panels = reconstruct(method, images, mask_ratio=mask_ratio, seed=seed, oracle=oracle).panels
    sheet = panel_sheet(panels, captions=[Path(p).name for p in pictures])
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
    return len(pictures)


def export_run(run: str, out: Path | None, kind: str) -> str:
    """Export an encoder; makes the run's own bundle first where training was cut short."""
    from mimray.trainers.bundles import CARD, bundle_place, fetch_bundle
    from mimray.trainers.convert import export_timm, export_transformers
    from mimray.trainers.storage import RunDir

    run_dir = RunDir(run)
    if run_dir.exists("plan.json") and not run_dir.exists(f"bundle/{CARD}"):
        _bundle_from_checkpoint(run_dir)
    if kind == "bundle":
        if out is None:
            return f"{bundle_place(run)}: bundle"
        return _copy_bundle(fetch_bundle(run), out)
    if out is None:
        raise BundleError(f"--format {kind} needs a place to write to", hint="export RUN OUT")
    exporters: dict[str, Callable[[Path, Path], str]] = {
        "timm": export_timm,
        "transformers": export_transformers,
    }
    return f"{out}: {kind}, {exporters[kind](fetch_bundle(run), out)}"


def _bundle_from_checkpoint(run: Any) -> None:
    from tempfile import TemporaryDirectory

    from mimray.trainers.config.run import Plan
    from mimray.trainers.engine.checkpoints import newest_whole
    from mimray.trainers.engine.export import read_checkpoint, write_bundle

    checkpoint = newest_whole(run)
    if checkpoint is None:
        raise BundleError(
            f"{run} has no checkpoint yet", hint="let it reach checkpoint.every_steps"
        )
    plan = Plan.model_validate_json(run.read("plan.json"))
    with TemporaryDirectory(prefix="mimray-") as scratch:
        (run / f"checkpoints/{checkpoint.name}").download(Path(scratch))
        state = read_checkpoint(Path(scratch), checkpoint, plan)
    command = f"mimray export {run}"
    write_bundle(run, plan, state, step=checkpoint.step, name=run.name, command=command)


def _copy_bundle(folder: Path, out: Path) -> str:
    import shutil

    if out.exists():
        raise BundleError(f"{out} exists", hint="choose another place")
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, out)
    return f"{out}: bundle"


def _draw_loss(run: Any) -> None:
    from tempfile import TemporaryDirectory

    from mimray.trainers.engine.metrics import read_metrics
    from mimray.trainers.pictures import loss_chart

    with TemporaryDirectory(prefix="mimray-") as scratch:
        file = Path(scratch) / "loss.png"
        loss_chart(read_metrics(run), file)
        run.write("loss.png", file.read_bytes())
