"""`mimray extract`: an encoder's features of a dataset, kept as Parquet."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console

from mimray.service.cluster import connected
from mimray.service.terminal.progress import CountingProgress, duration

if TYPE_CHECKING:
    from mimray.trainers.config.evaluation.extract import ExtractSpec

console = Console(stderr=True, highlight=False, soft_wrap=True)


def run_extract(
    bundle: str, data: str, out: str, spec: ExtractSpec, *, split: str | None
) -> dict[str, Any]:
    """Extract on the cluster, with progress; run again after a kill, it does what is missing.

    Args:
        bundle: a reference as `EncoderRef.parse` takes it.
        data: URI of the pictures, labelled or not.
        out: path or URI of the folder to make or to finish.
        spec: features to keep, and how they are stored.
        split: split of the data, where there are several; None takes `train`.

    Returns:
        The result that `--json` prints.

    Raises:
        MimrayError: a mistake of the user's.
    """
    from mimray.trainers.data.sources import open_source
    from mimray.trainers.evaluation.features.encoders import EncoderRef
    from mimray.trainers.evaluation.features.extraction import extract
    from mimray.trainers.storage import RunDir

    ref = EncoderRef.parse(bundle)
    source = open_source(data, split=split)
    began = time.monotonic()
    with connected(), CountingProgress("extracting", "pictures", console) as progress:
        told = partial(_without_phase, progress)
        found = extract(ref, source, RunDir(out), spec, progress=told)
    seconds = time.monotonic() - began
    manifest = found.manifest
    skipped = f", {len(manifest.skipped)} pictures skipped" if manifest.skipped else ""
    console.print(
        f"{found.out}: {manifest.num_rows} rows, {manifest.num_bytes / 2**20:.1f} MiB in "
        f"{len(manifest.parts)} parts, {found.num_written} of them new{skipped}, "
        f"{duration(seconds)}",
        markup=False,
    )
    return {
        "out": found.out.uri,
        "num_rows": manifest.num_rows,
        "num_bytes": manifest.num_bytes,
        "num_parts": len(manifest.parts),
        "num_written": found.num_written,
        "skipped": [item.model_dump() for item in manifest.skipped],
        "identity": manifest.extraction.identity,
        "data_fingerprint": manifest.extraction.data_fingerprint,
        "seconds": round(seconds, 2),
    }


def _without_phase(progress: CountingProgress, phase: str, done: int, total: int) -> None:
    progress(done, total)
