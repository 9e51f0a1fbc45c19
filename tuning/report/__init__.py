"""The report of a sweep at any stage, as a page, as text and as data.

In order: `values` formats numbers; `importance`, `speed` and `summary` compute what is reported;
`tables`, `theme`, `figures`, `key_figures` and `images` prepare it; `text` and `html` render it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mimray.trainers.data.files import join

if TYPE_CHECKING:
    from mimray.trainers.config.base import Config
    from mimray.trainers.storage import RunDir
    from mimray.tuning.record import SweepRecord
    from mimray.tuning.report.summary import SweepSummary

PAGE, TEXT, DATA = "report.html", "report.md", "report.json"
FORMAT = 1


def write_report(
    record: SweepRecord,
    sweep: RunDir,
    *,
    curves: Mapping[int, list[dict[str, Any]]] | None = None,
    speed: Mapping[float, float] | None = None,
) -> list[str]:
    """Write the report of a sweep at any stage; called again and again while it runs.

    Args:
        record: the record of a sweep at any stage.
        sweep: the sweep's directory.
        curves: rows of `metrics.jsonl` by trial, for curves of the loss.
        speed: the encoder's speed over the full sequence by mask ratio, as
            `mimray.tuning.report.speed.encoder_speed` measures it.

    Returns:
        The URIs of page, text and data.

    Raises:
        StorageError: the directory cannot be written to.
    """
    # plotly and Optuna take seconds to import.
    from mimray.tuning.report.html import page
    from mimray.tuning.report.summary import summarise
    from mimray.tuning.report.text import markdown

    summary = summarise(record, speed)
    files = {
        DATA: json.dumps(data_of(summary), allow_nan=False, indent=1),
        TEXT: markdown(summary),
        PAGE: page(summary, sweep, curves or {}),
    }
    for name, text in files.items():
        # A name may hold half of a surrogate pair, which UTF-8 has no bytes for.
        sweep.write(name, text.encode(errors="replace"))
    return [join(sweep.uri, name) for name in (PAGE, TEXT, DATA)]


def data_of(summary: SweepSummary) -> dict[str, Any]:
    """The data of a report, complete enough to draw it again, as strict JSON holds it.

    Args:
        summary: the sweep's summary.
    """
    from mimray.tuning.report.summary import rungs_of
    from mimray.tuning.report.values import plain

    ranked = [
        {
            "rank": rank,
            "trial": trial.number,
            "params": trial.params,
            "rungs": rungs_of(trial),
            "samples": trial.rungs[-1].samples,
            "score": trial.score,
            "standard_error": trial.rungs[-1].standard_error,
            "num_pictures": trial.rungs[-1].num_pictures,
            "against_best": _dumped(summary.against.get(trial.number)),
            "other_seeds": _dumped(summary.seeds.get(trial.number)),
            "loss": trial.loss,
            "device_seconds": trial.device_seconds,
            "state": trial.state,
        }
        for rank, trial in enumerate(summary.ranked, start=1)
    ]
    tree: dict[str, Any] = plain(
        {
            "format": FORMAT,
            "record": summary.record.model_dump(),
            "ranked": ranked,
            "final": _dumped(summary.record.final),
            "rungs": summary.rungs,
            "states": summary.states,
            "points": [point.model_dump() for point in summary.points],
            "pareto": {
                cost: [point.model_dump() for point in points]
                for cost, points in summary.fronts.items()
            },
            "heatmap": summary.heatmap.model_dump() if summary.heatmap is not None else None,
            "importances": summary.importance.model_dump(),
            "speed": [row.model_dump() for row in summary.speed],
            "losses_survived": summary.survived,
        }
    )
    return tree


def _dumped(value: Config | None) -> dict[str, Any] | None:
    return None if value is None else value.model_dump()
