"""`mimray data`: datasets made and described."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mimray.service.terminal.console import say
from mimray.service.terminal.progress import Progress, duration, show_count
from mimray.trainers.cluster import connected


def run_ingest(src: str, out: str, **options: Any) -> dict[str, Any]:
    """Ingest on the cluster, with progress.

    Args:
        src: a folder of pictures, Parquet, or a text file of URIs.
        out: the path or URI of the folder to make.
        **options: those of `mimray.trainers.data.ingest.ingest`.

    Returns:
        What `--json` prints.

    Raises:
        MimrayError: a mistake of the user's.
    """
    from mimray.trainers.data.ingest import ingest

    began = time.monotonic()
    with connected(), Progress() as progress:
        shown = show_count(progress, "ingesting", "pictures")
        report = ingest(src, out, progress=shown, **options)
    manifests = report.manifests
    for name, manifest in manifests.items():
        say(
            f"{report.out}{'/' if name else ''}{name}: {manifest.num_samples} pictures"
            + (f" of {len(manifest.class_names)} classes" if manifest.class_names else "")
            + f" in {len(manifest.shards)} shards, {manifest.image_bytes / 2**20:.1f} MiB, "
            f"{manifest.num_reencoded} re-encoded, {sum(manifest.rejected.values())} rejected, "
            f"{duration(time.monotonic() - began)}"
        )
        if manifest.rejected:
            counts = ", ".join(f"{n} {reason}" for reason, n in manifest.rejected.items())
            listed = "/".join(filter(None, (report.out, name, "rejected.jsonl")))
            say(f"rejected: {counts}; listed in {listed}")
    for note in report.label_notes:
        say(f"labels: {note}")
    for line in report.account.lines():
        say(line)
    facts = {
        name: {
            "num_samples": manifest.num_samples,
            "class_names": list(manifest.class_names),
            "fingerprint": manifest.fingerprint,
        }
        for name, manifest in manifests.items()
    }
    return {
        "out": report.out,
        "num_samples": sum(manifest.num_samples for manifest in manifests.values()),
        # Of a dataset without splits its own, of others those of each.
        **facts.get("", {}),
        "splits": {name: found for name, found in facts.items() if name},
        "num_rejected": report.num_rejected,
        "rejected": dict(sum((Counter(m.rejected) for m in manifests.values()), Counter())),
        "label_notes": list(report.label_notes),
        "account": report.account.to_json(),
    }


def run_inspect(uri: str, sheet: Path | None, label: str | None = None) -> dict[str, Any]:
    """Count a dataset's pictures, sizes and labels.

    Args:
        uri: the dataset's path or URI.
        sheet: the file of a contact sheet to draw.
        label: the column of the labels; `label` by default.

    Returns:
        What `--json` prints.

    Raises:
        DataError: there is no dataset, or it cannot be read.
    """
    from mimray.trainers.data.inspect import inspect

    found = inspect(uri, contact_sheet=sheet, label=label)
    accounts = {"account": found.account, "looked_at": found.looked_at}
    return asdict(found) | {name: account.to_json() for name, account in accounts.items()}


def inspection_text(found: Mapping[str, Any], sheet: Path | None = None) -> str:
    """An inspection for people, a line a fact.

    Args:
        found: the result of `run_inspect`.
        sheet: the file of its contact sheet.
    """
    facts = found["facts"]
    lines = [
        f"{facts['uri']}: {facts['num_samples']} pictures ({facts['kind']}), "
        f"{found['num_bytes'] / 2**20:.1f} MiB, fingerprint {facts['fingerprint'][:16]}"
    ]
    for side in ("width", "height"):
        if (span := found[side]) is not None:
            lines.append(
                f"{side:8} {span['smallest']} to {span['largest']} px, median {span['median']} "
                f"({found['num_measured']} measured)"
            )
    if found["num_broken"]:
        counts = ", ".join(f"{n} {reason}" for reason, n in found["broken"].items())
        lines.append(f"broken   {found['num_broken']} of the pictures looked at: {counts}")
    if len(found["splits"]) > 1:
        lines.append(f"splits   {', '.join(found['splits'])}")
    if found["label_counts"] is None:
        lines.append("labels   none")
    else:
        lines.append(f"labels   {len(found['label_counts'])} classes")
        lines += [f"  {n:7} {name}" for name, n in found["label_counts"].items()]
    lines += [f"         {note}" for note in found["label_notes"]]
    if (mixing := found["label_mixing"]) is not None and mixing["in_runs"]:
        lines.append(
            f"order    labels lie in runs: {mixing['stretch_rows']} rows in turn have "
            f"{mixing['classes']:.1f} classes on average, {mixing['shuffled_classes']:.1f} if "
            "shuffled; training draws from many row groups at once to mix them, "
            "`mimray data ingest` puts rows in random order"
        )
    if sheet is not None:
        lines.append(f"sheet    {sheet}")
    lines += [entry["message"] for entry in found["account"]]
    looked_at = f"of {found['num_measured']} looked at: "
    lines += [looked_at + entry["message"] for entry in found["looked_at"]]
    return "\n".join(lines)
