"""The figures of a verdict: three encoders scored by one task, or held against the start."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from mimray.service.commands.evaluate import Subject, evaluate_subjects, kept_result, setting_of
from mimray.service.commands.verdict_plan import NO_LABELS, Measurement, setting_of_pictures
from mimray.service.terminal.progress import Progress, show_phases

if TYPE_CHECKING:
    from mimray.trainers.evaluation.features.encoders import EncoderRef
    from mimray.trainers.storage import RunDir


def measured(
    measurement: Measurement, refs: Mapping[str, EncoderRef], out: RunDir
) -> dict[str, Any]:
    """One task's results for the three encoders; those that are there already are taken.

    Args:
        measurement: the task and its pictures.
        refs: the encoders, by name.
        out: the directory of the verdict, where results are kept.

    Returns:
        The figure, as `judgement.with_changes` takes it.
    """
    request, config = measurement.request, measurement.config
    subjects = _subjects(measurement, refs, out)
    results = {name: kept_result(one, request, config) for name, one in subjects.items()}
    missing = [name for name, result in results.items() if result is None]
    if missing:
        made = evaluate_subjects([subjects[name] for name in missing], request, config)
        results |= dict(zip(missing, made, strict=True))
    known = {name: result for name, result in results.items() if result is not None}
    assert known.keys() == refs.keys()
    comparable = request.task != NO_LABELS or _same_width(refs)
    notes = list(known["adapted"]["notes"])
    if measurement.role == "retain":
        notes = [f"retention set: {note}" for note in notes]
    width = "RankMe compares encoders of the same width alone: there is no difference to judge"
    return {
        "role": measurement.role,
        "data": request.data,
        "task": request.task,
        "name": measurement.name,
        "metric": known["adapted"]["metric"],
        "num_pictures": known["adapted"]["num_val"],
        "estimator": known["adapted"]["estimator"],
        "comparable": comparable,
        "encoders": {
            name: {key: result[key] for key in ("headline", "standard_error", "evidence")}
            for name, result in known.items()
        },
        "results": {
            name: (one.folder / f"{request.task}.json").uri for name, one in subjects.items()
        },
        "notes": [*notes, *([] if comparable else [width])],
    }


def _subjects(
    measurement: Measurement, refs: Mapping[str, EncoderRef], out: RunDir
) -> dict[str, Subject]:
    """The encoders as an evaluation takes them; results lie in `<role>/<encoder>/`."""
    pictures = _listing(measurement)
    return {
        name: Subject(
            text=ref.text,
            ref=ref,
            folder=out / measurement.role / name,
            identity=f"{ref.identity} {pictures}",
            # The start's card is another's, and a card has one score of a task.
            recorded=name == "adapted" and measurement.role == "labelled",
        )
        for name, ref in refs.items()
    }


def _listing(measurement: Measurement) -> str:
    """A digest of the names and sizes of the files measured on: others are measured again."""
    from mimray.trainers.data.files import list_files

    request = measurement.request
    places = [place for place in (request.data, request.val) if place is not None]
    files = [(file.path, file.num_bytes) for place in places for file in list_files(place)]
    asked = json.dumps([files, request.skip_invalid])
    return hashlib.sha256(asked.encode()).hexdigest()[:16]


def _same_width(refs: Mapping[str, EncoderRef]) -> bool:
    widths = {refs[name].card().encoder.out_width for name in ("adapted", "start")}
    return len(widths) == 1


def similarity(
    measurement: Measurement, refs: Mapping[str, EncoderRef], out: RunDir
) -> dict[str, Any] | None:
    """The CKA of the adapted and of the untrained encoder with the start, on the same pictures.

    Args:
        measurement: the pictures, without labels.
        refs: the encoders, by name.
        out: the directory of the verdict.

    Returns:
        The figure; None where an encoder gives all pictures the same features.
    """
    from mimray.trainers.evaluation.features.pooled import pooled_features
    from mimray.trainers.evaluation.probes.cka import cka_figure
    from mimray.trainers.evaluation.splits import pictures_to_score

    source = pictures_to_score(setting_of_pictures(measurement))
    found = {}
    with Progress() as progress:
        shown = show_phases(progress)
        for name, subject in _subjects(measurement, refs, out).items():
            setting = setting_of(measurement.request, subject, measurement.config, "auto")
            most = measurement.config.model_dump()["limit"]
            setting = replace(
                setting,
                limit=min(setting.limit or most, most),
                progress=partial(shown, subject.text),
            )
            found[name] = pooled_features(
                refs[name], source, setting, "mean", phase=f"features of {measurement.role}"
            )
    start = found["start"]
    figures = {
        name: cka_figure(start.x, found[name].x, source.facts.fingerprint, start.index)
        for name in ("adapted", "untrained")
    }
    if not all(math.isfinite(figure.value) for figure in figures.values()):
        return None
    return {
        "role": measurement.role,
        "data": measurement.request.data,
        "task": "cka",
        "name": "",
        "metric": "CKA with the start",
        "num_pictures": len(start.x),
        "estimator": "jackknife",
        "comparable": False,
        "encoders": {
            name: {
                "headline": figure.value,
                "standard_error": figure.standard_error,
                "evidence": figure.evidence,
            }
            for name, figure in figures.items()
        },
        "results": {},
        "notes": [],
    }
