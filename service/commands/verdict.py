"""`mimray verdict`: an encoder that was adapted, held against its start and an untrained one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
from mimray.service.commands.verdict_figures import measured, similarity
from mimray.service.commands.verdict_plan import plan_verdict
from mimray.service.terminal.console import say
from mimray.trainers.cluster import connected
from mimray.trainers.errors import ConfigError

if TYPE_CHECKING:
    from mimray.trainers.data.sources import Source
    from mimray.trainers.evaluation.charts import DotRow
    from mimray.trainers.evaluation.features.encoders import EncoderRef
    from mimray.trainers.storage import RunDir


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


def check_verdict(request: VerdictRequest) -> list[str]:
    """Refuse pictures that no verdict could be given on, before anything is computed.

    Neither encoder need be there yet.

    Returns:
        Sentences on what will be measured, for people.

    Raises:
        MimrayError: a data set cannot be opened, lacks labels or pictures, or the retention set is
            the one adapted to.
    """
    return plan_verdict(request).sentences


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
    plan = plan_verdict(request, refs["adapted"].card().data_fingerprint)
    for sentence in plan.sentences:
        say(sentence)
    out = _folder(request, refs["adapted"])
    with connected():
        found = [measured(measurement, refs, out) for measurement in plan.measurements]
        alike = [similarity(measurement, refs, out) for measurement in plan.unlabelled]
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


def _encoders(request: VerdictRequest) -> dict[str, EncoderRef]:
    """The three encoders by name.

    Raises:
        BundleError: one is not there.
        ConfigError: one is untrained, or both hold the same weights.
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
    from mimray.trainers.storage import RunDir

    if request.out is not None:
        return RunDir(request.out)
    if adapted.place is not None:
        return RunDir(parent(results_folder(adapted.place).uri)) / "verdict"
    return RunDir(f"runs/verdict/{request.adapted.replace('@', '-')}")


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
