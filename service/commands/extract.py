"""`mimray extract`: an encoder's features of a dataset, kept as Parquet."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mimray.service.terminal.console import say
from mimray.service.terminal.progress import Progress, duration, show_count
from mimray.trainers.cluster import connected_if_larger

if TYPE_CHECKING:
    from mimray.trainers.config.evaluation.extract import ExtractSpec


def check_spec(options: Mapping[str, Any]) -> ExtractSpec:
    """Check the features that a command line asks for.

    Args:
        options: values of the keys of `ExtractSpec`; without `pooled`, `layers` and `tokens` the
            mean of the tokens is taken.

    Raises:
        ValidationError: a value that is not allowed.
    """
    from mimray.trainers.config.evaluation.extract import ExtractSpec

    spec = dict(options)
    if not (spec["pooled"] or spec["layers"] or spec["tokens"]):
        spec["pooled"] = ("mean",)
    return ExtractSpec.model_validate(spec)


def run_extract(
    bundle: str,
    data: str,
    out: str,
    spec: ExtractSpec,
    *,
    split: str | None = None,
    label: str | None = None,
) -> dict[str, Any]:
    """Extract on the cluster, with progress; run again after a kill, it does what is missing.

    Args:
        bundle: an encoder's reference, as `EncoderRef.parse` takes it.
        data: the path or URI of the pictures, labelled or not.
        out: the path or URI of the folder to make or to finish.
        spec: the features to keep.
        split: the split of the data, where there are several; None takes `train`.
        label: the column of the labels; `label`, or class folders, by default.

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
    source = open_source(data, split=split, label=label)
    began = time.monotonic()
    with connected_if_larger(), Progress() as progress:
        shown = show_count(progress, "extracting", "pictures")
        found = extract(
            ref,
            source,
            RunDir(out),
            spec,
            progress=lambda phase, done, total: shown(done, total),
        )
    seconds = time.monotonic() - began
    manifest = found.manifest
    skipped = f", {len(manifest.skipped)} pictures skipped" if manifest.skipped else ""
    say(
        f"{found.out}: {manifest.num_rows} rows, {manifest.num_bytes / 2**20:.1f} MiB in "
        f"{len(manifest.parts)} parts, {found.num_written} of them new{skipped}, "
        f"{duration(seconds)}"
    )
    for note in source.label_notes:
        say(f"labels: {note}")
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
