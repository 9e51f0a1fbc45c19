"""`mimray models`: names, versions and aliases of bundles in the registry."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimray.trainers.evaluation.uncertainty import described
from mimray.trainers.registry import Registry, Version

if TYPE_CHECKING:
    from mimray.tuning.record import SweepRecord, TrialRecord


def register_model(bundle: str, name: str, alias: str | None, storage: str) -> dict[str, Any]:
    """Register the encoder of a run, a bundle or a sweep's trial.

    Args:
        bundle: a bundle's or a run's path or URI, or `SWEEP:best` or `SWEEP:N` for a trial.
        name: the model's name.
        alias: an alias to point at the new version.
        storage: the directory or URI where runs are tracked.

    Returns:
        The version, as `--json` prints it.

    Raises:
        MimrayError: no such bundle or trial, or a name that is not allowed.
    """
    from mimray.trainers.storage import RunDir
    from mimray.tuning.record import find_trial, trial_dir

    lineage: dict[str, str] = {}
    if not Path(bundle).exists() and "://" not in bundle.rpartition(":")[2]:
        found = find_trial(bundle, storage)
        if found is not None:
            sweep, trial = found
            bundle = trial_dir(RunDir(sweep.uri), trial.number).uri
            lineage = {
                "sweep": sweep.uri,
                "trial": trial.name,
                "params": json.dumps(trial.params),
                **_sweep_scores(sweep, trial),
            }
    return _row(Registry.open(storage).register(bundle, name, alias, lineage))


def _sweep_scores(sweep: SweepRecord, trial: TrialRecord) -> dict[str, str]:
    """Of the winner the score on pictures kept from the choice, and the one it was chosen by."""
    if sweep.best is None or sweep.best.number != trial.number:
        return {}
    found = {"sweep_chosen_by": f"{sweep.metric} {described(sweep.chosen_by(trial))}"}
    if sweep.reported is None:
        return found
    kept = described(sweep.reported.model_dump())
    return {"sweep_score": f"{sweep.metric} {kept} kept from the choice", **found}


def list_models(name: str | None, storage: str) -> list[dict[str, Any]]:
    """All versions in the registry, or those of one model."""
    return [_row(version) for version in Registry.open(storage).versions(name)]


def show_model(reference: str, storage: str) -> dict[str, Any]:
    """The version that `NAME`, `NAME@ALIAS` or `NAME@vN` names."""
    return _row(Registry.open(storage).find(reference))


def set_alias(reference: str, alias: str, storage: str) -> dict[str, Any]:
    """Point an alias at a version, and give that version."""
    return _row(Registry.open(storage).alias(reference, alias))


def add_head(reference: str, folder: str, name: str | None, storage: str) -> dict[str, Any]:
    """Register a trained head with the version of the encoder that it was trained on.

    Args:
        reference: `NAME`, `NAME@ALIAS` or `NAME@vN`.
        folder: the head's folder or URI, as `mimray evaluate` leaves it.
        name: the head's name; the folder's by default.
        storage: the directory or URI where runs are tracked.

    Returns:
        The version, as `--json` prints it.

    Raises:
        ServingError: there is no head, or it belongs to another encoder.
    """
    from mimray.serving.inference.heads import check_head
    from mimray.trainers.bundles import fetch_folder, read_card
    from mimray.trainers.storage import RunDir

    registry = Registry.open(storage)
    version, head = registry.find(reference), fetch_folder(folder)
    name = name or RunDir(folder).name
    check_head(name, head, read_card(registry.fetch(version)))
    return _row(registry.add_head(version, name, head))


def version_text(row: Mapping[str, Any]) -> str:
    """One version for people: a line a fact, then a line a score."""
    lines = []
    for key, value in row.items():
        if key == "scores":
            lines += [_score_line(task, score) for task, score in value.items()]
        elif value:
            lines.append(f"{key:16} {' '.join(value) if isinstance(value, list) else value}")
    return "\n".join(lines)


def versions_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a version: reference, aliases, method, headlines."""
    lines = []
    for row in rows:
        scores = "  ".join(f"{task} {described(score)}" for task, score in row["scores"].items())
        aliases = "".join(f" @{alias}" for alias in row["aliases"])
        lines.append(f"{row['model']}{aliases}  {row['method']}  {scores}".rstrip())
    return "\n".join(lines)


def _score_line(task: str, score: Mapping[str, Any]) -> str:
    """A score with its error; of a sweep's trial also the pictures it is of."""
    line = f"{task:16} {score['metric']} {described(score)}"
    chosen = score.get("chosen_by")
    if chosen is not None:
        return f"{line} kept from the choice; chosen by {described(chosen)}"
    return f"{line} that the trial was chosen by" if score.get("part") == "choice" else line


def _row(version: Version) -> dict[str, Any]:
    return {
        "model": version.reference,
        "name": version.name,
        "version": version.number,
        "aliases": list(version.aliases),
        "registered": time.strftime("%Y-%m-%d %H:%M", time.localtime(version.created_ms / 1000)),
        **version.facts,
        "scores": version.scores,
        "heads": sorted(version.heads),
        "mlflow_run": version.run_id,
    }
