"""`mimray verdict`: an encoder that was adapted, held against its start and an untrained one."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from mimray.service.commands.evaluate import (
    EvaluationRequest,
    Subject,
    evaluate_subjects,
    kept_result,
    setting_of,
)
from mimray.service.commands.judgement import (
    ENCODERS,
    change_text,
    judged,
    line_of,
    name_of,
    short,
    verdict_markdown,
    with_changes,
)
from mimray.service.commands.tasks import TASKS
from mimray.service.terminal.console import say
from mimray.service.terminal.progress import Progress, show_phases
from mimray.trainers.cluster import connected
from mimray.trainers.errors import ConfigError, DataError
from mimray.trainers.evaluation.tasks import config_class, task_config

if TYPE_CHECKING:
    from mimray.trainers.config.base import Config
    from mimray.trainers.data.sources import Source
    from mimray.trainers.evaluation.charts import DotRow
    from mimray.trainers.evaluation.features.encoders import EncoderRef
    from mimray.trainers.storage import RunDir

Role = Literal["data", "labelled", "retain"]
"""A data set of a verdict: pictures adapted to, labelled ones, those on which nothing be lost."""

TASKS_OF = {
    "masks": ("dense-knn", "segmentation"),
    "instances": ("dense-knn", "segmentation"),
    "boxes": ("detection",),
    "classes": ("knn",),
}
"""Tasks on labelled pictures by the kind of their labels."""
ALSO_OF = {"instances": ("detection",), "classes": ("linear",)}
"""Tasks that `--task` may ask for besides."""
RETAINED = {"masks": "dense-knn", "instances": "dense-knn", "classes": "knn"}
"""The task on labelled pictures of a retention set; boxes are not read there."""
NO_LABELS = "rankme"
NAMES = {"knn": "kNN", "linear": "linear probe", "dense-knn": "dense kNN", NO_LABELS: "RankMe"}

MIN_PICTURES = 8
"""Fewest pictures to score on. The bootstrap's variance over N pictures is too small by 1 / N."""


@dataclass(frozen=True)
class VerdictRequest:
    """The verdict that the user asked for.

    Attributes:
        adapted: the adapted encoder: a bundle, a run or a registered name.
        start: the encoder that the adaptation began from, likewise.
        data: the path or URI of the pictures adapted to; their labels are not read.
        labelled: the path or URI of labelled pictures, with masks, boxes or classes; None for none.
        val: the path or URI of labelled pictures to score on; None takes the split of `labelled`,
            or holds pictures out where it has none.
        retain: the path or URI of a second data set, on which nothing should be lost; None for
            none.
        tasks: the tasks on `labelled`; by default those that its labels allow.
        out: the directory of the verdict; `verdict/` of the adapted run by default.
        limit: the number of pictures taken of each data set, evenly spread.
        seed: the seed of everything drawn.
        overrides: assignments `key=value` to the options of the tasks on `labelled` that have the
            key, `task.key=value` to those of one task, and with `retain.` before it to those on
            `retain`.
        label: the column of the labels; `label`, or class folders, by default.
        val_share: the share of each class that is held out; None for the default.
        val_seed: the seed that chooses these.
        skip_invalid: leave out wrong labels and list them.
        command: the command line, for the record.
    """

    adapted: str
    start: str
    data: str
    labelled: str | None = None
    val: str | None = None
    retain: str | None = None
    tasks: tuple[str, ...] = ()
    out: str | None = None
    limit: int | None = None
    seed: int = 0
    overrides: tuple[str, ...] = ()
    label: str | None = None
    val_share: float | None = None
    val_seed: int = 0
    skip_invalid: bool = False
    command: str = ""


@dataclass(frozen=True)
class _Measurement:
    """One task on one data set, for each of the three encoders.

    Attributes:
        role: the data set.
        request: the evaluation.
        config: the task's options.
    """

    role: Role
    request: EvaluationRequest
    config: Config

    @property
    def name(self) -> str:
        """The task's name for people."""
        task = self.request.task
        head = getattr(self.config, "head", "")
        return NAMES.get(task, f"{head} {task}".strip())


@dataclass
class _Plan:
    """All that a verdict measures, found before anything is computed.

    Attributes:
        training: the pictures adapted to.
        measurements: tasks, in the order in which they are shown.
        notes: sentences on the pictures, for people.
    """

    training: Source
    measurements: list[_Measurement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_verdict(request: VerdictRequest) -> list[str]:
    """Refuse pictures that no verdict could be given on, before anything is computed.

    Neither encoder need be there yet.

    Returns:
        Sentences on what will be measured, for people.

    Raises:
        MimrayError: a data set cannot be opened, lacks labels or pictures, or the retention set is
            the one adapted to.
    """
    return _sentences(_planned(request))


def run_verdict(request: VerdictRequest) -> dict[str, Any]:
    """Score the adapted encoder, its start and an untrained one, and judge the difference.

    What an earlier start of the same verdict has measured is not measured again.

    Returns:
        What `--json` prints: `gain` (True, False, or None where there are no labels to tell by),
        `reasons`, `lines` and `notes` in words, the `figures` with their intervals, `files`.

    Raises:
        MimrayError: a mistake of the user's, before anything heavy starts where possible.
    """
    refs = _encoders(request)
    plan = _planned(request, refs["adapted"].card().data_fingerprint)
    for sentence in _sentences(plan):
        say(sentence)
    out = _folder(request, refs["adapted"])
    found = []
    with connected():
        for measurement in plan.measurements:
            found.append(_measured(measurement, refs, out))
        alike = [_similarity(request, role, refs, out) for role in _roles_of_similarity(request)]
        pictures = _pca_maps(refs, plan.training)
    figures = [with_changes(figure) for figure in (*found, *filter(None, alike))]
    gain, reasons = judged(figures)
    notes = [*plan.notes, *_unlike(refs), *(note for f in figures for note in f["notes"])]
    if None in alike:
        notes.append(
            "no CKA: an encoder gives all pictures the same features, as one that collapsed"
        )
    verdict = {
        "gain": gain,
        "reasons": reasons,
        "lines": [line_of(figure) for figure in figures],
        "notes": list(dict.fromkeys(notes)),
        "adapted": request.adapted,
        "start": request.start,
        "data": request.data,
        "labelled": request.labelled,
        "retain": request.retain,
        "seed": request.seed,
        "limit": request.limit,
        "command": request.command,
        "weights_sha256": {name: ref.card().weights_sha256 for name, ref in refs.items()},
        "figures": figures,
    }
    return {**verdict, "folder": out.uri, "files": _write(out, verdict, pictures)}


def verdict_text(verdict: Mapping[str, Any]) -> str:
    """A verdict for people; its last lines say what was gained."""
    notes = [f"note: {note}" for note in verdict["notes"]]
    files = [verdict["files"][kind] for kind in ("md", "png", "pca")]
    return "\n".join([*notes, *files, *verdict["lines"], *_last_lines(verdict)])


def _last_lines(verdict: Mapping[str, Any]) -> list[str]:
    word = {True: "gain", False: "no gain", None: "no claim"}[verdict["gain"]]
    first, *others = verdict["reasons"]
    return [*others, f"verdict: {word}: {first}"]


# Before anything is computed


def _planned(request: VerdictRequest, trained_on: str = "") -> _Plan:
    """Open and check all pictures.

    Args:
        request: the verdict asked for.
        trained_on: the fingerprint of the data that the adapted encoder's card names; empty where
            there is none yet.
    """
    from mimray.trainers.data.sources import open_source
    from mimray.trainers.evaluation.splits import pictures_to_score

    if request.labelled is None and (request.tasks or request.val):
        given = "--task" if request.tasks else "--val"
        raise ConfigError(f"{given} goes with labelled pictures", hint="--labelled DATA")
    training = open_source(request.data, with_labels=False)
    plan = _Plan(training)
    assigned = _by_role(request.overrides)
    if request.labelled is not None:
        _plan_labelled(plan, request, request.labelled, assigned["labelled"])
    elif assigned["labelled"]:
        raise ConfigError(
            f"{assigned['labelled'][0]}: options of tasks go with labelled pictures",
            hint="--labelled DATA",
        )
    rankme = _unlabelled(request, "data", request.data)
    _enough(len(pictures_to_score(_setting(rankme))), rankme)
    plan.measurements.append(rankme)
    if request.retain is not None:
        _plan_retention(plan, request, request.retain, assigned["retain"], trained_on)
    elif assigned["retain"]:
        raise ConfigError(
            f"retain.{assigned['retain'][0]} goes with a retention set", hint="--retain DATA"
        )
    return plan


def _plan_labelled(
    plan: _Plan, request: VerdictRequest, place: str, overrides: Sequence[str]
) -> None:
    """Add the tasks on labelled pictures."""
    from mimray.trainers.evaluation.measure import check_pictures, label_kind

    kind = label_kind(place, request.label)
    if kind is None:
        raise DataError(
            f"--labelled {place} has no labels: neither masks, boxes nor a class for each picture",
            hint="docs/downstream.md has the layouts; without --labelled no gain can be claimed",
        )
    allowed = (*TASKS_OF[kind], *ALSO_OF.get(kind, ()))
    for task in request.tasks:
        if task not in allowed:
            raise ConfigError(
                f"--task {task}: {place} is labelled by {kind}", hint=f"{', '.join(allowed)}"
            )
    tasks = tuple(dict.fromkeys(request.tasks)) or TASKS_OF[kind]
    for task, config in _options(tasks, overrides).items():
        evaluation = replace(
            _evaluation(request, task, place),
            val=request.val,
            label=request.label,
            val_share=request.val_share,
            val_seed=request.val_seed,
            skip_invalid=request.skip_invalid,
        )
        measurement = _Measurement("labelled", evaluation, config)
        _, scored = check_pictures(task, config, _setting(measurement), "--labelled")
        _enough(len(scored), measurement)
        plan.measurements.append(measurement)
        seen = len(scored.intersection(plan.training.places()))
        note = (
            f"{seen:,} of {len(scored):,} pictures of {place} to score on were adapted to, without "
            "their labels"
        )
        if seen and note not in plan.notes:
            plan.notes.append(note)


def _plan_retention(
    plan: _Plan,
    request: VerdictRequest,
    place: str,
    overrides: Sequence[str],
    trained_on: str,
) -> None:
    """Add a task on the second data set: by its labels where it has some of use."""
    from mimray.trainers.data.sources import open_source
    from mimray.trainers.evaluation.measure import check_pictures, label_kind
    from mimray.trainers.evaluation.splits import pictures_to_score

    unlabelled = _unlabelled(request, "retain", place)
    scored = pictures_to_score(_setting(unlabelled))
    _refuse_same(plan, trained_on, open_source(place, with_labels=False), scored, place)
    _enough(len(scored), unlabelled)
    kind = label_kind(place)
    task = RETAINED.get(kind or "")
    if task is None:
        if overrides:
            raise ConfigError(
                f"retain.{overrides[0]}: {place} has no labels that a task would read",
                hint="leave it out",
            )
        plan.measurements.append(unlabelled)
        return
    ((task, config),) = _options((task,), overrides).items()
    evaluation = replace(_evaluation(request, task, place), skip_invalid=True)
    measurement = _Measurement("retain", evaluation, config)
    try:
        _, held = check_pictures(task, config, _setting(measurement), "--retain")
        _enough(len(held), measurement)
    except DataError as error:
        if overrides:
            raise
        plan.notes.append(f"labels of the retention set are not used: {error.args[0]}")
        measurement = unlabelled
    plan.measurements.append(measurement)


def _refuse_same(plan: _Plan, trained_on: str, whole: Source, scored: Source, place: str) -> None:
    """Refuse a retention set that the adaptation saw: it would show what was learnt."""
    training, pictures = plan.training, {*whole.places(), *scored.places()}
    prints = {whole.pictures_fingerprint, whole.facts.fingerprint}
    same = not prints.isdisjoint((training.pictures_fingerprint, trained_on))
    seen = len(pictures.intersection(training.places()))
    if same or seen == len(pictures):
        raise DataError(
            f"--retain {place} is the data adapted to: its {len(whole):,} pictures are among those "
            "trained on",
            hint="a second data set that the start was good at, such as what it was trained on",
        )
    if seen:
        plan.notes.append(
            f"{seen:,} of {len(pictures):,} pictures of the retention set {place} were adapted to, "
            "too"
        )


def _enough(num_pictures: int, measurement: _Measurement) -> None:
    """Refuse pictures too few for an interval."""
    request = measurement.request
    used = min(num_pictures, request.limit or num_pictures)
    if used >= MIN_PICTURES:
        return
    limited = f", of which --limit takes {used:,}" if used < num_pictures else ""
    cure = f"--limit {MIN_PICTURES} or more" if limited else "more pictures"
    if measurement.role == "labelled" and not limited:
        cure = "more labelled pictures, --val with others, or a larger --val-share"
    raise DataError(
        f"{request.data}: {num_pictures:,} pictures to score {request.task} on{limited}, fewer "
        f"than the {MIN_PICTURES} that a 95 % interval takes",
        hint=cure,
    )


def _by_role(overrides: Sequence[str]) -> dict[str, list[str]]:
    """Assignments to tasks on labelled pictures, and to those on the retention set."""
    prefix = "retain."
    return {
        "labelled": [text for text in overrides if not text.startswith(prefix)],
        "retain": [text.removeprefix(prefix) for text in overrides if text.startswith(prefix)],
    }


def _options(tasks: Sequence[str], overrides: Sequence[str]) -> dict[str, Config]:
    """The options of each task.

    Raises:
        ConfigError: no task has a key, or a value is not allowed.
    """
    chosen: dict[str, list[str]] = {task: [] for task in tasks}
    for assignment in overrides:
        key = assignment.partition("=")[0]
        task, dot, _ = key.partition(".")
        if dot and task in TASKS:
            takers, assignment = [task], assignment.removeprefix(f"{task}.")
            if task not in tasks:
                raise ConfigError(f"{key}: {task} is not measured", hint=", ".join(tasks))
        else:
            takers = [name for name in tasks if task in config_class(TASKS[name]).model_fields]
        # With one task, its own error is the better one: it knows keys that are alike.
        takers = takers or list(tasks)[: len(tasks) == 1]
        if not takers:
            raise ConfigError(
                f"{key}: neither of {', '.join(tasks)} has such an option",
                hint=f"`mimray evaluate --task {tasks[0]} --options` lists those of one",
            )
        for name in takers:
            chosen[name].append(assignment)
    return {task: task_config(TASKS[task], found) for task, found in chosen.items()}


def _evaluation(request: VerdictRequest, task: str, place: str) -> EvaluationRequest:
    return EvaluationRequest(
        task=task, data=place, limit=request.limit, seed=request.seed, command=request.command
    )


def _unlabelled(request: VerdictRequest, role: Role, place: str) -> _Measurement:
    """The measurement that needs no labels."""
    evaluation = replace(_evaluation(request, NO_LABELS, place), skip_invalid=True)
    return _Measurement(role, evaluation, task_config(TASKS[NO_LABELS], ()))


def _setting(measurement: _Measurement) -> Any:
    """The setting of a measurement, of no encoder: to look at its pictures."""
    nobody = Subject("", None, _results("."), "")
    return setting_of(measurement.request, nobody, measurement.config, "cpu")


def _sentences(plan: _Plan) -> list[str]:
    """What will be measured, and what is to be known about the pictures."""
    found = []
    for role in dict.fromkeys(one.role for one in plan.measurements):
        those = [one for one in plan.measurements if one.role == role]
        names = ", ".join(one.name for one in those)
        similarity = "" if role == "labelled" else ", CKA with the start"
        found.append(f"{role} {those[0].request.data}: {names}{similarity}")
    return [*found, *(f"note: {note}" for note in plan.notes)]


# Encoders


def _encoders(request: VerdictRequest) -> dict[str, EncoderRef]:
    """The three encoders by name.

    Raises:
        BundleError: one is not there.
        ConfigError: both are the same, or take pictures that are not alike.
    """
    from mimray.trainers.evaluation.features.encoders import UNTRAINED, EncoderRef

    for name, text in (("ADAPTED", request.adapted), ("START", request.start)):
        if text.startswith(UNTRAINED):
            raise ConfigError(
                f"{name} {text}: an untrained encoder is measured beside both anyway",
                hint="two bundles, runs or registered names",
            )
    refs = {
        "adapted": EncoderRef.parse(request.adapted, seed=request.seed),
        "start": EncoderRef.parse(request.start, seed=request.seed),
        "untrained": EncoderRef.parse(f"{UNTRAINED}{request.adapted}", seed=request.seed),
    }
    if refs["adapted"].identity == refs["start"].identity:
        raise ConfigError(
            f"{request.adapted} and {request.start} hold the same weights: nothing was adapted",
            hint="ADAPTED START, in this order",
        )
    return refs


def _unlike(refs: Mapping[str, EncoderRef]) -> list[str]:
    """Notes on what differs between the inputs of both encoders, which the figures contain too."""
    adapted, start = refs["adapted"].card(), refs["start"].card()
    notes = []
    if adapted.image_size != start.image_size:
        sizes = [f"{height}x{width}" for height, width in (adapted.image_size, start.image_size)]
        notes.append(
            f"adapted and start take pictures of {sizes[0]} and {sizes[1]} pixels: whole-picture "
            "figures are of each one's own size"
        )
    if adapted.channels != start.channels:
        words = {1: "grey", 3: "colour"}
        notes.append(
            f"adapted takes {words[adapted.channels]} pictures, start {words[start.channels]} ones:"
            " the figures contain that, too"
        )
    if adapted.pooling != start.pooling:
        notes.append(
            f"kNN and linear pool as each card says: adapted by {adapted.pooling}, start by "
            f"{start.pooling}"
        )
    return notes


def _folder(request: VerdictRequest, adapted: EncoderRef) -> RunDir:
    """The directory of the verdict: beside the adapted bundle's run, where it has one."""
    from mimray.trainers.data.files import parent
    from mimray.trainers.evaluation.results import results_folder

    if request.out is not None:
        return _results(request.out)
    if adapted.place is not None:
        return _results(parent(results_folder(adapted.place).uri)) / "verdict"
    return _results(f"runs/verdict/{request.adapted.replace('@', '-')}")


def _results(place: str) -> RunDir:
    from mimray.trainers.storage import RunDir

    return RunDir(place)


# Measuring


def _measured(
    measurement: _Measurement, refs: Mapping[str, EncoderRef], out: RunDir
) -> dict[str, Any]:
    """One task's results for the three encoders; those that are there already are taken."""
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
        "notes": [*known["adapted"]["notes"], *([] if comparable else [width])],
    }


def _subjects(
    measurement: _Measurement, refs: Mapping[str, EncoderRef], out: RunDir
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


def _listing(measurement: _Measurement) -> str:
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


def _roles_of_similarity(request: VerdictRequest) -> list[Role]:
    return ["data"] if request.retain is None else ["data", "retain"]


def _similarity(
    request: VerdictRequest, role: Role, refs: Mapping[str, EncoderRef], out: RunDir
) -> dict[str, Any] | None:
    """The CKA of the adapted and of the untrained encoder with the start, on the same pictures.

    Returns:
        The figure; None where an encoder gives all pictures the same features.
    """
    from mimray.trainers.evaluation.features.pooled import pooled_features
    from mimray.trainers.evaluation.probes.cka import cka_figure
    from mimray.trainers.evaluation.splits import pictures_to_score

    place = request.data if role == "data" else request.retain
    assert place is not None
    measurement = _unlabelled(request, role, place)
    source = pictures_to_score(_setting(measurement))
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
                refs[name], source, setting, "mean", phase=f"features of {role}"
            )
    start = found["start"]
    figures = {
        name: cka_figure(start.x, found[name].x, source.facts.fingerprint, start.index)
        for name in ("adapted", "untrained")
    }
    if not all(math.isfinite(figure.value) for figure in figures.values()):
        return None
    return {
        "role": role,
        "data": place,
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


def _pca_maps(refs: Mapping[str, EncoderRef], training: Source) -> bytes:
    from mimray.trainers.evaluation.features.extraction import local_device
    from mimray.trainers.evaluation.pca_maps import pca_maps

    device = local_device("auto")
    start, adapted = (refs[name].load().to(device) for name in ("start", "adapted"))
    return pca_maps(start, adapted, training, device=device)


def _write(out: RunDir, verdict: Mapping[str, Any], pca: bytes) -> dict[str, str]:
    """Write the verdict's files; returns the URI of each by kind."""
    from mimray.trainers.evaluation.charts import dot_chart

    out.create()
    title = f"{short(verdict['adapted'])} against {short(verdict['start'])}, with 95 % intervals"
    contents = {
        "pca": ("pca.png", pca),
        "png": ("verdict.png", dot_chart([_dots(f) for f in verdict["figures"]], title)),
        "md": ("verdict.md", verdict_markdown(verdict, _last_lines(verdict)).encode()),
        # Last: where it is, the rest is too.
        "json": ("verdict.json", json.dumps(verdict, indent=2).encode() + b"\n"),
    }
    for name, content in contents.values():
        out.write(name, content)
    return {kind: (out / name).uri for kind, (name, _) in contents.items()}


def _dots(figure: Mapping[str, Any]) -> DotRow:
    """A figure as the chart shows it."""
    from mimray.trainers.evaluation.charts import DotRow

    change, encoders = figure["change"], figure["encoders"]
    outcome = "" if change is None else f": {change['outcome']} ({change_text(change)})"
    pictures = f"{figure['num_pictures']:,} pictures of {short(figure['data'])}"
    points = {n: (encoders[n]["value"], encoders[n]["interval"]) for n in ENCODERS if n in encoders}
    return DotRow(f"{name_of(figure)}, {pictures}{outcome}", points)
