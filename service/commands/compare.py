"""`mimray evaluate --compare`: encoders side by side, in one table and one bar chart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mimray.service.commands.evaluate import EvaluationRequest, held_out_text, run_evaluate
from mimray.trainers.storage import RunDir

SHOWN_FIGURES = 6


def write_comparison(results: Sequence[Mapping[str, Any]], out: str) -> dict[str, str]:
    """Write `compare-<task>.{json,md,png}`.

    Args:
        results: one result an encoder, of one task and the same data.
        out: the directory, made where it is missing.

    Returns:
        The URI of each file, by kind.
    """
    from mimray.trainers.evaluation.charts import score_chart

    folder, task = RunDir(out), results[0]["task"]
    folder.create()
    title = f"{task} on {results[0]['data']}{held_out_text(results[0])}: {results[0]['metric']}"
    chart = score_chart([r["encoder"] for r in results], [r["headline"] for r in results], title)
    name = f"compare-{task}"
    contents = {
        "json": json.dumps(list(results), indent=2).encode() + b"\n",
        "md": _markdown(results).encode(),
        "png": chart,
    }
    for suffix, content in contents.items():
        folder.write(f"{name}.{suffix}", content)
    return {suffix: (folder / f"{name}.{suffix}").uri for suffix in contents}


def run_comparison(encoders: Sequence[str], request: EvaluationRequest) -> dict[str, Any]:
    """Score encoders by one task and lay the results side by side.

    Args:
        encoders: the encoders, as `run_evaluate` takes them.
        request: the evaluation; its `out` is the directory of the comparison, `runs/evaluation`
            by default. Each encoder's own results stay beside its bundle.

    Returns:
        What `--json` prints: the results, and the URI of each file by kind.
    """
    results = run_evaluate(encoders, replace(request, out=None))
    files = write_comparison(results, request.out or "runs/evaluation")
    return {"results": results, "files": files}


def comparison_text(found: Mapping[str, Any]) -> str:
    """A comparison for people: the table, the place of the chart, and the notes of all."""
    results = found["results"]
    notes = dict.fromkeys(f"note: {note}" for r in results for note in r["notes"])
    lines = [table(results), held_out_text(results[0]).strip(), found["files"]["png"], *notes]
    return "\n".join(line for line in lines if line)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Encoders down, figures across, the best first; as wide as it needs to be."""
    heads, rows = _cells(results)
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [
        "  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])])
        for cells in (heads, *rows)
    ]
    return "\n".join(lines)


def _markdown(results: Sequence[Mapping[str, Any]]) -> str:
    heads, rows = _cells(results)
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(results: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    metric = results[0]["metric"]
    figures = [
        name
        for name, value in results[0]["metrics"].items()
        if isinstance(value, float) and name != metric
    ][:SHOWN_FIGURES]
    ranked = sorted(results, key=lambda result: -result["headline"])
    rows = [
        [
            result["encoder"],
            f"{result['headline']:.4f}",
            *(_shown(result["metrics"].get(name)) for name in figures),
            f"{result['seconds']:.0f}",
        ]
        for result in ranked
    ]
    return ["encoder", metric, *figures, "seconds"], rows


def _shown(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "-"
