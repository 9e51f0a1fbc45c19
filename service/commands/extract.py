"""`mimray extract`: an encoder's features of a dataset, kept as Parquet."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from rich.console import Console

from mimray.service.cluster import connected
from mimray.service.terminal.progress import CountingProgress, duration

console = Console(stderr=True, highlight=False, soft_wrap=True)


def run_extract(
    bundle: str,
    data: str,
    out: str,
    *,
    split: str | None,
    pooled: Sequence[str],
    layers: Sequence[int],
    tokens: bool,
    norm: bool,
    dtype: str,
    limit: int | None,
    image_size: tuple[int, int] | None,
    part_pictures: int,
    skip_invalid: bool,
) -> dict[str, Any]:
    """Extract on the cluster, with progress; run again after a kill, it does what is missing.

    Args:
        bundle: as `EncoderRef.parse` takes it.
        data: the pictures, labelled or not.
        out: folder to make or to finish; path or URI.
        split: of the data, where there are several; None takes `train`.
        pooled: `mean`, `cls`; mean where nothing else is asked for.
        layers: whose feature maps are kept.
        tokens: keep the patch tokens.
        norm: apply the final norm to feature maps.
        dtype: `float16` or `float32`.
        limit: so many pictures, evenly spread.
        image_size: (height, width) of the input, pixels; the card's by default.
        part_pictures: most pictures in a file.
        skip_invalid: leave out pictures that cannot be decoded, and list them.

    Returns:
        What `--json` prints.

    Raises:
        MimrayError: a mistake of the user's.
    """
    from mimray.trainers.config.evaluation.extract import ExtractSpec
    from mimray.trainers.data.sources import open_source
    from mimray.trainers.evaluation.features.encoders import EncoderRef
    from mimray.trainers.evaluation.features.extraction import extract
    from mimray.trainers.storage import RunDir

    spec = ExtractSpec.model_validate(
        {
            "pooled": pooled or (() if layers or tokens else ("mean",)),
            "layers": layers,
            "tokens": tokens,
            "norm": norm,
            "dtype": dtype,
            "limit": limit,
            "image_size": image_size,
            "part_pictures": part_pictures,
            "skip_invalid": skip_invalid,
        }
    )
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
