"""The pictures and tasks of a verdict, found and checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from mimray.service.commands.evaluate import EvaluationRequest, Subject, setting_of
from mimray.service.commands.tasks import TASKS
from mimray.trainers.errors import ConfigError, DataError
from mimray.trainers.evaluation.tasks import config_class, task_config

if TYPE_CHECKING:
    from mimray.service.commands.verdict import VerdictRequest
    from mimray.trainers.config.base import Config
    from mimray.trainers.data.sources import Source
    from mimray.trainers.evaluation.score import Setting

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
class Measurement:
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
class VerdictPlan:
    """All that a verdict measures, found before anything is computed.

    Attributes:
        training: the pictures adapted to.
        measurements: tasks, in the order in which they are shown.
        unlabelled: data sets on which features are compared without labels.
        notes: sentences on the pictures, for people.
    """

    training: Source
    measurements: list[Measurement] = field(default_factory=list)
    unlabelled: list[Measurement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def sentences(self) -> list[str]:
        """Sentences on the tasks of each data set, and the notes on its pictures."""
        found = []
        for role in dict.fromkeys(one.role for one in self.measurements):
            those = [one for one in self.measurements if one.role == role]
            names = ", ".join(one.name for one in those)
            similarity = "" if role == "labelled" else ", CKA with the start"
            found.append(f"{role} {those[0].request.data}: {names}{similarity}")
        return [*found, *(f"note: {note}" for note in self.notes)]


def plan_verdict(request: VerdictRequest, trained_on: str = "") -> VerdictPlan:
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
    plan = VerdictPlan(training)
    assigned = _by_role(request.overrides)
    if request.labelled is not None:
        _plan_labelled(plan, request, request.labelled, assigned["labelled"])
    elif assigned["labelled"]:
        raise ConfigError(
            f"{assigned['labelled'][0]}: options of tasks go with labelled pictures",
            hint="--labelled DATA",
        )
    rankme = without_labels(request, "data", request.data)
    _enough(len(pictures_to_score(setting_of_pictures(rankme))), rankme)
    plan.measurements.append(rankme)
    plan.unlabelled.append(rankme)
    if request.retain is not None:
        _plan_retention(plan, request, request.retain, assigned["retain"], trained_on)
    elif assigned["retain"]:
        raise ConfigError(
            f"retain.{assigned['retain'][0]} goes with a retention set", hint="--retain DATA"
        )
    return plan


def _plan_labelled(
    plan: VerdictPlan, request: VerdictRequest, place: str, overrides: Sequence[str]
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
        measurement = Measurement("labelled", evaluation, config)
        _, scored = check_pictures(task, config, setting_of_pictures(measurement), "--labelled")
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
    plan: VerdictPlan,
    request: VerdictRequest,
    place: str,
    overrides: Sequence[str],
    trained_on: str,
) -> None:
    """Add a task on the second data set: by its labels where it has some of use."""
    from mimray.trainers.data.sources import open_source
    from mimray.trainers.evaluation.measure import check_pictures, label_kind
    from mimray.trainers.evaluation.splits import pictures_to_score

    unlabelled = without_labels(request, "retain", place)
    scored = pictures_to_score(setting_of_pictures(unlabelled))
    _refuse_same(plan, trained_on, open_source(place, with_labels=False), scored, place)
    _enough(len(scored), unlabelled)
    plan.unlabelled.append(unlabelled)
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
    measurement = Measurement("retain", evaluation, config)
    try:
        _, held = check_pictures(task, config, setting_of_pictures(measurement), "--retain")
        _enough(len(held), measurement)
    except DataError as error:
        if overrides:
            raise
        plan.notes.append(f"labels of the retention set are not used: {error.args[0]}")
        measurement = unlabelled
    plan.measurements.append(measurement)


def _refuse_same(
    plan: VerdictPlan, trained_on: str, whole: Source, scored: Source, place: str
) -> None:
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


def _enough(num_pictures: int, measurement: Measurement) -> None:
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


def without_labels(request: VerdictRequest, role: Role, place: str) -> Measurement:
    """The measurement that needs no labels."""
    evaluation = replace(_evaluation(request, NO_LABELS, place), skip_invalid=True)
    return Measurement(role, evaluation, task_config(TASKS[NO_LABELS], ()))


def setting_of_pictures(measurement: Measurement) -> Setting:
    """The setting of a measurement, of no encoder: to look at its pictures."""
    from mimray.trainers.storage import RunDir

    nobody = Subject("", None, RunDir("."), "")
    return setting_of(measurement.request, nobody, measurement.config, "cpu")
