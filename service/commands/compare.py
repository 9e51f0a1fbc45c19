"""`mimray evaluate --compare`: encoders side by side, in one table and one bar chart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from mimray.service.commands.evaluate import EvaluationRequest, held_out_text, run_evaluate
from mimray.trainers.evaluation.uncertainty import (
    Difference,
    Figure,
    difference,
    figure_text,
)
from mimray.trainers.storage import RunDir

SHOWN_FIGURES = 6
UNTRAINED = "untrained:"
COMPARED = {"against_best": "less the best", "against_untrained": "less untrained"}


def write_comparison(results: Sequence[Mapping[str, Any]], out: str) -> dict[str, str]:
    """Write `compare-<task>.{json,md,png}`.

    Args:
        results: one result an encoder, of one task and the same data, from `with_differences`.
        out: the directory, made where it is missing.

    Returns:
        The URI of each file, by kind.
    """
    from mimray.trainers.evaluation.charts import score_chart

    folder, task = RunDir(out), results[0]["task"]
    folder.create()
    title = f"{task} on {results[0]['data']}{held_out_text(results[0])}: {results[0]['metric']}"
    counts = sorted({r["num_val"] for r in results if "num_val" in r})
    if counts:
        title += f" on {' and '.join(f'{count:,}' for count in counts)} pictures"
    chart = score_chart(
        [r["encoder"] for r in results],
        [r["headline"] for r in results],
        title,
        [r.get("standard_error") for r in results],
    )
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
    results = with_differences(run_evaluate(encoders, replace(request, out=None)))
    files = write_comparison(results, request.out or "runs/evaluation")
    return {"results": results, "files": files}


def with_differences(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Results with `against_best` and `against_untrained`, where there is one to hold it against.

    Each is the difference of the headlines with its standard error, picture by picture where both
    are of the same pictures, and `told_apart`, false where chance over pictures may explain it.
    Results of versions that knew no standard error stay as they are.
    """
    if all(result.get("standard_error") is None for result in results):
        return [dict(result) for result in results]
    best = max(results, key=lambda result: result["headline"])
    untrained = {r["encoder"]: r for r in results if r["encoder"].startswith(UNTRAINED)}
    found = []
    for result in results:
        base = untrained.get(UNTRAINED + result["encoder"])
        others = {"against_best": best if result is not best else None, "against_untrained": base}
        made = {
            name: asdict(difference(Figure.of(result), Figure.of(other))) if other else None
            for name, other in others.items()
        }
        found.append({**result, **made})
    return found


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
    counted = any("num_val" in result for result in results)
    compared = [name for name in COMPARED if any(result.get(name) for result in results)]
    ranked = sorted(results, key=lambda result: -result["headline"])
    rows = [
        [
            result["encoder"],
            figure_text(result["headline"], result.get("standard_error")),
            *([f"{result.get('num_val', 0):,}"] if counted else []),
            *(Difference(**result[name]).text() if result.get(name) else "" for name in compared),
            *(_shown(result["metrics"].get(name)) for name in figures),
            f"{result['seconds']:.0f}",
        ]
        for result in ranked
    ]
    heads = [*(["pictures"] if counted else []), *(COMPARED[name] for name in compared)]
    return ["encoder", metric, *heads, *figures, "seconds"], rows


def _shown(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "-"
