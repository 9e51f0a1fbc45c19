"""`/v1/predict`: pictures in, predictions of trained heads out."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np

from mimray.serving.config import MIB
from mimray.serving.inference.heads import Classified, Head, Segmented
from mimray.serving.inference.preprocess import Array, Picture
from mimray.serving.inference.timeline import Timeline
from mimray.serving.operations.calls import Call, Reply
from mimray.serving.operations.metadata import described_head
from mimray.serving.operations.operation import Computation, Model
from mimray.serving.operations.request_images import read_pictures
from mimray.serving.operations.response_formats import dumps
from mimray.serving.wire.errors import (
    ConflictError,
    InvalidRequestError,
    ModelFailureError,
    TooLargeError,
)
from mimray.trainers.data.geometry import Size

if TYPE_CHECKING:
    from mimray.trainers.evaluation.detection.detector import Detections

Masks = Literal["rle", "png", "map", "none"]
_QUERY = ("model", "version", "heads", "masks", "min_score", "top")
# A pixel of a map in JSON: two digits and a comma at the most for up to 100 classes.
_MAP_BYTES = 3


@dataclass(frozen=True)
class Wanted:
    """Options of an answer: heads, form of masks, thresholds.

    Attributes:
        heads: names of the heads to ask.
        masks: form of masks; `map`, the rows of class indices, is of segmentation alone, and
            objects have run lengths then.
        min_score: objects and classes below it are left out.
        top: most objects, and most classes with a score; None for all.
    """

    heads: tuple[str, ...]
    masks: Masks = "rle"
    min_score: float | None = None
    top: int | None = None


async def _predict(model: Model, call: Call, timeline: Timeline) -> tuple[Reply, int]:
    unknown = call.query.keys() - set(_QUERY)
    if unknown:
        raise InvalidRequestError(
            f"there is no parameter {sorted(unknown)[0][:40]!r}", hint=f"there are {list(_QUERY)}"
        )
    wanted = parse_wanted(model, call.query)
    pictures = await read_pictures(call, model.urls, max_pictures=model.limits.pictures)
    trees = await find(model, pictures, wanted, timeline)
    heads = model.predictor.heads
    body = {
        "model": model.name,
        "version": model.version,
        "weights_sha256": model.card.weights_sha256,
        "heads": {name: described_head(heads[name]) for name in wanted.heads},
        "data": [{"index": index, **tree} for index, tree in enumerate(trees)],
    }
    return Reply(200, {"Content-Type": "application/json"}, dumps(body).encode()), len(pictures)


PREDICT = Computation(
    name="predict",
    path="/v1/predict",
    summary="Predictions of trained heads",
    compute=_predict,
    model_in="query",
)


async def find(
    model: Model, pictures: Sequence[Picture], wanted: Wanted, timeline: Timeline
) -> list[dict[str, Any]]:
    """Predictions of heads for pictures, each as `PredictedPicture` without its index.

    Args:
        model: the model.
        pictures: the pictures, encoded or as uint8 pixels.
        wanted: the heads, and what is to be told.
        timeline: gets the phases.

    Raises:
        EndpointError: as `Predictor.find` does, or the answer would be too large.
    """
    heads = {name: model.predictor.heads[name] for name in wanted.heads}
    most = model.limits.answer_mib * MIB

    def render(source_size: Size, found: Mapping[str, Any]) -> dict[str, Any]:
        if wanted.masks == "map" and math.prod(source_size) * _MAP_BYTES * len(heads) > most:
            raise TooLargeError(
                f"a map of {source_size[1]} x {source_size[0]} pixels is too large as JSON",
                hint="masks=png or rle",
            )
        told = {name: _told(heads[name], found[name], wanted) for name in heads}
        return {"source_size": list(source_size), "heads": told}

    return await model.predictor.find(pictures, wanted.heads, render, timeline)


def parse_wanted(model: Model, parameters: Mapping[str, object]) -> Wanted:
    """Read the parameters of a request.

    Args:
        model: the model.
        parameters: values by name, as text or of their own type.

    Raises:
        ConflictError: the model has no heads.
        InvalidRequestError: a value that is not allowed.
    """
    known = tuple(model.predictor.heads)
    if not known:
        raise ConflictError(
            f"{model.name} is served without a trained head",
            hint="`heads` in serve.yaml, or `mimray serve --head NAME=FOLDER`",
        )
    words = [word.strip() for word in str(parameters.get("heads") or "").split(",")]
    names = tuple(word for word in words if word) or known
    for name in names:
        if name not in known:
            raise InvalidRequestError(
                f"there is no head {name[:40]!r}", hint=f"there are {', '.join(known)}"
            )
    if len(set(names)) != len(names):
        raise InvalidRequestError("a head is asked for twice")
    masks = str(parameters.get("masks") or "rle")
    if masks not in get_args(Masks):
        raise InvalidRequestError(
            f"parameter `masks` is {masks[:40]!r}", hint="use rle, png, map or none"
        )
    return Wanted(
        names, cast(Masks, masks), _score(parameters.get("min_score")), _top(parameters.get("top"))
    )


def _told(head: Head, found: Any, wanted: Wanted) -> dict[str, Any]:
    """The prediction of a head as JSON."""
    if isinstance(found, Segmented):
        return {"task": head.task, **_segmentation(head, found.classes, wanted)}
    if isinstance(found, Classified):
        return {"task": head.task, **_classification(head, found.scores, wanted)}
    return {"task": head.task, "objects": _objects(head, found, wanted)}


def _segmentation(head: Head, classes: Array, wanted: Wanted) -> dict[str, Any]:
    indices, counts = np.unique(classes, return_counts=True)
    regions = []
    for place in np.argsort(-counts, kind="stable"):
        index, pixels = int(indices[place]), int(counts[place])
        region: dict[str, Any] = {
            "label": head.class_names[index],
            "index": index,
            "pixels": pixels,
            "share": pixels / classes.size,
        }
        if wanted.masks == "rle":
            region["mask"] = _run_lengths(classes == index)
        regions.append(region)
    told: dict[str, Any] = {"regions": regions}
    if wanted.masks == "map":
        told["map"] = classes.tolist()
    elif wanted.masks == "png":
        told["map"] = _png(classes.astype(np.uint8 if len(head.class_names) <= 256 else np.uint16))
    return told


def _objects(head: Head, found: Detections, wanted: Wanted) -> list[dict[str, Any]]:
    if not (np.isfinite(found.boxes).all() and np.isfinite(found.scores).all()):
        raise ModelFailureError("a head's boxes are not finite")
    objects = []
    for place in range(len(found.scores))[: wanted.top]:
        index, score = int(found.labels[place]), float(found.scores[place])
        if wanted.min_score is not None and score < wanted.min_score:
            continue
        one: dict[str, Any] = {
            "label": head.class_names[index],
            "index": index,
            "score": score,
            "box": [float(value) for value in found.boxes[place]],
        }
        if found.masks is not None and wanted.masks != "none":
            one["mask"] = _mask(found.masks[place], wanted.masks)
        objects.append(one)
    return objects


def _classification(head: Head, scores: Array, wanted: Wanted) -> dict[str, Any]:
    if np.isnan(scores).any():
        raise ModelFailureError("a head's scores are not finite")
    order = np.argsort(-scores, kind="stable")
    listed = [
        {"label": head.class_names[index], "index": int(index), "score": float(scores[index])}
        for index in order[: wanted.top]
        if np.isfinite(scores[index])  # a class that there was nothing to learn from
        and (wanted.min_score is None or scores[index] >= wanted.min_score)
    ]
    return {"label": head.class_names[order[0]], "scores": listed}


def _mask(run_lengths: Mapping[str, Any], masks: Masks) -> dict[str, Any] | str:
    if masks == "png":
        from faster_coco_eval.core import mask as mask_api

        return _png(np.ascontiguousarray(mask_api.decode(dict(run_lengths))) * np.uint8(255))
    return _as_json(run_lengths)


def _run_lengths(mask: Array) -> dict[str, Any]:
    from faster_coco_eval.core import mask as mask_api

    return _as_json(mask_api.encode(np.asfortranarray(mask.astype(np.uint8))))


def _as_json(run_lengths: Mapping[str, Any]) -> dict[str, Any]:
    height, width = run_lengths["size"]
    return {"size": [int(height), int(width)], "counts": run_lengths["counts"].decode("ascii")}


def _png(values: Array) -> str:
    from PIL import Image

    from mimray.trainers.pictures import png

    return "data:image/png;base64," + base64.b64encode(png(Image.fromarray(values))).decode("ascii")


def _score(value: object) -> float | None:
    if value is None or value == "":
        return None
    try:
        score = float(str(value))
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise InvalidRequestError(f"parameter `min_score` is {str(value)[:40]!r}", hint="0.5")
    return score


def _top(value: object) -> int | None:
    if value is None or value == "":
        return None
    text = str(value)
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 7 and int(text)):
        raise InvalidRequestError(f"parameter `top` is {text[:40]!r}", hint="a number from 1 on")
    return int(text)
