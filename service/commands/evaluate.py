"""`mimray evaluate`: scores of one encoder or several by one task."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from mimray.service.commands.tasks import TASKS
from mimray.service.terminal.console import say
from mimray.service.terminal.phases import PhaseLink, PhaseRecorder
from mimray.service.terminal.progress import Progress, duration, show_phases
from mimray.trainers.cluster import connected, connected_if_larger
from mimray.trainers.errors import ConfigError
from mimray.trainers.evaluation.tasks import load, task_config

if TYPE_CHECKING:
    from mimray.trainers.config.base import Config
    from mimray.trainers.data.hold_out import HoldOut
    from mimray.trainers.evaluation.features.encoders import EncoderRef, MakeEncoder
    from mimray.trainers.evaluation.score import Score, Setting
    from mimray.trainers.storage import RunDir


API_KEY_VARIABLE = "MIMRAY_API_KEY"


@dataclass(frozen=True)
class EvaluationRequest:
    """The evaluation that the user asked for, the same for every encoder that is compared.

    Attributes:
        task: the task's name.
        data: the path or URI of the pictures to learn from.
        val: the path or URI of the pictures to score on; None takes the dataset's own split, or
            holds pictures out where it has none.
        limit: the number of pictures taken of each, evenly spread.
        epochs: the length of what is trained; the task's own by default.
        seed: the seed of everything drawn.
        overrides: assignments `key=value` to the task's options.
        image_size: (height, width) in pixels of an untrained encoder named by its architecture.
        finetune: train the encoder with the head, in dense tasks.
        through: an endpoint's URL; encoders are then names of its models.
        skip_invalid: leave out wrong labels and list them.
        out: the directory of results; beside each bundle by default.
        command: the command line, for the record.
        label: the column of the labels; `label`, or class folders, by default.
        val_share: the share of each class that is held out; None for the default.
        val_seed: the seed that chooses these.
    """

    task: str
    data: str
    val: str | None = None
    limit: int | None = None
    epochs: int | None = None
    seed: int = 0
    overrides: tuple[str, ...] = ()
    image_size: tuple[int, int] | None = None
    finetune: bool = False
    through: str | None = None
    skip_invalid: bool = False
    out: str | None = None
    command: str = ""
    label: str | None = None
    val_share: float | None = None
    val_seed: int = 0


@dataclass(frozen=True)
class Subject:
    """One encoder to score.

    Attributes:
        text: the reference as the user wrote it.
        ref: the encoder, where it is at hand.
        folder: the directory of its results.
        identity: a text that tells it from others in what is kept between runs.
        recorded: True if its scores go onto the bundle's card, into MLflow and the registry.
    """

    text: str
    ref: EncoderRef | None
    folder: RunDir
    identity: str
    recorded: bool = True


def run_evaluate(encoders: Sequence[str], request: EvaluationRequest) -> list[dict[str, Any]]:
    """Score encoders by a task; results go beside their bundles, onto cards and into MLflow.

    Args:
        encoders: bundles, runs, `untrained:…`, or names of an endpoint's models.
        request: the evaluation asked for, the same for each.

    Returns:
        The content of each `<task>.json`, with the places of its pictures.

    Raises:
        MimrayError: a mistake of the user's, before anything heavy starts where possible.
    """
    overrides = (*request.overrides, *(("finetune=true",) if request.finetune else ()))
    config = task_config(TASKS[request.task], overrides, request.epochs)
    _check_through(request, config)
    subjects = [_subject(text, request) for text in encoders]
    if request.image_size and not any(s.ref is not None and s.ref.shape for s in subjects):
        raise ConfigError(
            "--image-size: no encoder is named by its architecture", hint="untrained:vit_tiny"
        )
    return evaluate_subjects(subjects, request, config)


def evaluate_subjects(
    subjects: Sequence[Subject], request: EvaluationRequest, config: Config
) -> list[dict[str, Any]]:
    """Score encoders by a task, and keep each result in the encoder's folder.

    Args:
        subjects: the encoders.
        request: the evaluation asked for, the same for each.
        config: the task's options.

    Returns:
        The content of each `<task>.json`, with the places of its pictures.
    """
    results: dict[int, dict[str, Any]] = {}
    dense = TASKS[request.task].dense
    run = _run_on_devices if dense else _run_here
    with connected() if dense else connected_if_larger():
        # Each result is kept at once, so that a later failure does not lose it.
        for number, score, seconds in run(subjects, request, config):
            results[number] = _keep(subjects[number], score, request, config, seconds)
    return [results[number] for number in range(len(subjects))]


def kept_result(
    subject: Subject, request: EvaluationRequest, config: Config
) -> dict[str, Any] | None:
    """The result that an encoder's folder has of this very evaluation; None where it has none."""
    name = f"{request.task}.json"
    if not subject.folder.exists(name):
        return None
    try:
        found: dict[str, Any] = json.loads(subject.folder.read(name))
    except ValueError:  # it was cut off, as by a full disk
        return None
    return found if found.get("asked") == _asked(subject, request, config) else None


def _check_through(request: EvaluationRequest, config: Config) -> None:
    if request.through is None:
        return
    if not TASKS[request.task].dense:
        dense = ", ".join(name for name, task in TASKS.items() if task.dense)
        raise ConfigError(
            f"--through: {request.task} needs the bundle at hand", hint=f"it goes with {dense}"
        )
    if getattr(config, "finetune", False):
        raise ConfigError("--through: an endpoint's encoder is frozen", hint="leave out finetune")


def _subject(text: str, request: EvaluationRequest) -> Subject:
    from mimray.trainers.evaluation.features.encoders import EncoderRef
    from mimray.trainers.evaluation.results import results_folder
    from mimray.trainers.storage import RunDir

    name = text.replace(":", "-").replace("/", "-").strip("-.")
    if request.through is not None:
        folder = RunDir(request.out or f"runs/evaluation/{name}")
        return Subject(text, None, folder, f"{request.through}#{text}")
    ref = EncoderRef.parse(text, image_size=request.image_size, seed=request.seed)
    if request.out is not None:
        folder = RunDir(request.out)
    elif ref.place is not None:
        folder = results_folder(ref.place)
    elif ref.bundle and not ref.registered:
        folder = results_folder(RunDir(ref.bundle)) / "untrained"
    else:
        folder = RunDir(f"runs/evaluation/{name}")
    return Subject(text, ref, folder, ref.identity)


def _run_here(
    subjects: Sequence[Subject],
    request: EvaluationRequest,
    config: Config,
) -> Iterator[tuple[int, Score, float]]:
    """Evaluate one after the other, in this process; the tasks use the cluster themselves."""
    evaluate = load(TASKS[request.task].evaluate)
    with Progress() as progress:
        shown = show_phases(progress)
        for number, subject in enumerate(subjects):
            assert subject.ref is not None
            setting = setting_of(request, subject, config, "auto")
            setting = replace(setting, progress=partial(shown, subject.text))
            began = time.monotonic()
            score = evaluate(subject.ref, setting, config)
            shutil.rmtree(setting.folder, ignore_errors=True)
            yield number, score, time.monotonic() - began


def _run_on_devices(
    subjects: Sequence[Subject],
    request: EvaluationRequest,
    config: Config,
) -> Iterator[tuple[int, Score, float]]:
    """Evaluate at once as many as there are devices, each in a Ray task that holds one."""
    import ray

    held = _one_device()
    device = "cuda" if held.gpus else "cpu"
    recorder = ray.remote(PhaseRecorder).options(num_cpus=0).remote()
    # The task of a lost worker is run again, and goes on from the state it kept, if that is there.
    work = ray.remote(_evaluate_on_device).options(
        num_cpus=held.cpus, num_gpus=held.gpus, max_retries=2
    )
    waiting = {}
    for number, subject in enumerate(subjects):
        setting = setting_of(request, subject, config, device)
        setting = replace(setting, progress=PhaseLink(recorder, number))
        encoder = _encoder_maker(subject, request, config, device)
        task = work.remote(request.task, encoder, setting, config, held.num_threads)
        waiting[task] = number
    with Progress() as progress:
        shown = show_phases(progress)
        try:
            while waiting:
                done, _ = ray.wait(list(waiting), num_returns=1, timeout=0.5)
                for number, phase in ray.get(recorder.phases.remote()).items():
                    shown(subjects[number].text, *phase)
                for task in done:
                    yield waiting.pop(task), *ray.get(task)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        finally:
            for task in waiting:
                ray.cancel(task, force=True)


def _evaluate_on_device(
    task: str, make_encoder: MakeEncoder, setting: Setting, config: Config, num_threads: int
) -> tuple[Score, float]:
    """Run a task in a Ray worker that holds one device; gives the score and its seconds."""
    import torch

    torch.set_num_threads(num_threads)  # Ray sets OMP_NUM_THREADS to 1
    evaluate = load(TASKS[task].evaluate)
    began = time.monotonic()
    score: Score = evaluate(make_encoder, setting, config)
    shutil.rmtree(setting.folder, ignore_errors=True)
    return score, time.monotonic() - began


class _Device(NamedTuple):
    """The resources of a task that computes on one device.

    Attributes:
        cpus: CPUs held.
        gpus: GPUs held.
        num_threads: threads that the task computes with.
    """

    cpus: float
    gpus: float
    num_threads: int


def _one_device() -> _Device:
    """A GPU and its share of a node's CPUs; without GPUs, all CPUs free on the largest node."""
    import ray
    from ray._private.state import available_resources_per_node

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    with_gpu = [node for node in nodes if node.get("GPU", 0) >= 1]
    if with_gpu:
        cpus = min(max(1.0, node.get("CPU", 1) // node["GPU"]) for node in with_gpu)
        return _Device(cpus, 1.0, int(cpus))
    free = max(node.get("CPU", 0) for node in available_resources_per_node().values())
    if free < 1:
        # Say so: the wait may be long.
        say("no CPU is free in the cluster: waiting for one", "yellow")
    # Figures depend in their last digits on the number of threads, so it must not depend on what
    # else happens to be running.
    num_threads = max(1, int(max(node.get("CPU", 0) for node in nodes)))
    return _Device(max(1.0, free // 1), 0.0, num_threads)


def setting_of(
    request: EvaluationRequest, subject: Subject, config: Config, device: str
) -> Setting:
    """The setting of a task for one encoder.

    Args:
        request: the evaluation asked for.
        subject: the encoder.
        config: the task's options.
        device: the device to compute on, as torch names it, or `auto`.
    """
    from mimray.trainers.data.cache import user_cache
    from mimray.trainers.evaluation.score import Setting

    data, val = _places(request)
    return Setting(
        data=data,
        val=val,
        limit=request.limit,
        seed=request.seed,
        skip_invalid=request.skip_invalid,
        device=device,
        folder=user_cache("evaluation") / _asked(subject, request, config)[:20],
        progress=_silent,
        command=request.command,
        label=request.label,
        hold_out=_hold_out(request),
    )


def _asked(subject: Subject, request: EvaluationRequest, config: Config) -> str:
    """A digest of all that an evaluation's outcome follows from, but the pictures' bytes."""
    options = config.model_dump(mode="json")
    pictures = (*_places(request), request.limit, request.label, str(_hold_out(request)))
    asked = (subject.identity, request.task, pictures, request.seed, options)
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _places(request: EvaluationRequest) -> tuple[str, str | None]:
    """Places of the pictures to learn from and to score on, as workers find them."""
    from mimray.trainers.data.files import absolute

    return absolute(request.data), absolute(request.val) if request.val else None


def _hold_out(request: EvaluationRequest) -> HoldOut:
    from mimray.trainers.data.hold_out import HoldOut

    share = HoldOut.share if request.val_share is None else request.val_share
    return HoldOut(share, request.val_seed)


def _silent(phase: str, done: int, total: int) -> None:
    """Progress that is shown nowhere; replaced where a task begins."""


def _encoder_maker(
    subject: Subject, request: EvaluationRequest, config: Config, device: str
) -> MakeEncoder:
    if request.through is not None:
        key = os.environ.get(API_KEY_VARIABLE) or None
        return partial(_far_encoder, request.through, subject.text, key)
    assert subject.ref is not None
    return partial(_near_encoder, subject.ref, device, getattr(config, "finetune", False))


def _near_encoder(ref: EncoderRef, device: str, finetune: bool) -> Any:
    from mimray.trainers.evaluation.features.map_cache import CachedEncoder

    encoder = ref.load().to(device)
    return encoder if finetune else CachedEncoder(encoder, ref.identity)


def _far_encoder(url: str, model: str, api_key: str | None) -> Any:
    from mimray.service.commands.remote_encoder import RemoteEncoder
    from mimray.trainers.evaluation.features.map_cache import CachedEncoder

    encoder = RemoteEncoder(url, model, api_key)
    # A key apart from the bundle's own, so that maps from HTTP and from the bundle never mix.
    return CachedEncoder(encoder, f"http:{encoder.card.weights_sha256}")


def _keep(
    subject: Subject, score: Score, request: EvaluationRequest, config: Config, seconds: float
) -> dict[str, Any]:
    """Write a result beside its bundle, onto the card, into MLflow and the registry."""
    from mimray.trainers.evaluation.results import result_of, write_result

    if request.val_share is not None and score.hold_out is None:
        note = "--val-share is not used: there are pictures to score on"
        score = replace(score, notes=(*score.notes, note))
    card = None if subject.ref is None else subject.ref.card()
    about = {
        "task": request.task,
        "encoder": subject.text,
        "command": request.command,
        "data": request.data,
        "val": request.val,
        "label": request.label,
        "limit": request.limit,
        "seed": request.seed,
        "config": config.model_dump(mode="json"),
        "plan_hash": card.plan_hash if card else "",
        "weights_sha256": card.weights_sha256 if card else "",
        "through": request.through,
        "asked": _asked(subject, request, config),
        "seconds": round(seconds, 2),
    }
    result = result_of(score, about)
    pictures = write_result(subject.folder, request.task, result, score)
    if subject.recorded and subject.ref is not None:
        _record(subject.ref, request.task, result, score)
    return {**result, "folder": subject.folder.uri, "pictures": pictures}


def _record(ref: EncoderRef, task: str, result: Mapping[str, Any], score: Score) -> None:
    """Put a score onto the bundle's card and into MLflow, or into the registry."""
    from mimray.trainers.evaluation.results import add_to_card, card_score, track_score
    from mimray.trainers.registry import Registry

    if ref.place is not None:
        track_score(ref.place, add_to_card(ref.place, task, result), task, score)
    elif ref.registered and not ref.untrained:
        registry = Registry.open()
        registry.add_score(registry.find(ref.registered), task, card_score(result))


def result_text(result: Mapping[str, Any]) -> str:
    """A result for people: the headline, every figure, the places of files, the notes."""
    from mimray.trainers.evaluation.uncertainty import described

    figures = [
        f"  {name:24} {value:.4f}"
        for name, value in result["metrics"].items()
        if isinstance(value, float)
    ]
    headline = (
        f"{result['encoder']}: {result['task']} {result['metric']} {described(result)}"
        f"{held_out_text(result)}, {duration(result['seconds'])}"
    )
    file = f"{result['folder']}/{result['task']}.json"
    notes = [f"note: {note}" for note in result["notes"]]
    return "\n".join([headline, *figures, file, *result["pictures"], *notes])


def held_out_text(result: Mapping[str, Any]) -> str:
    """The rule by which a result's pictures were held out, in brackets; empty where none was."""
    rule = result.get("hold_out")
    return f" (held out: {rule['share']:.0%}, seed {rule['seed']})" if rule else ""
