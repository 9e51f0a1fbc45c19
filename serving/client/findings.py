"""Predictions of trained heads, as values of the client."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from mimray.serving.wire import bodies
from mimray.serving.wire.codecs import Array
from mimray.serving.wire.errors import InvalidRequestError, ModelFailureError
from mimray.serving.wire.oip_messages import InferResponse
from mimray.serving.wire.run_lengths import decode_mask

HEAD_OUTPUT = "head_"
"""Prefix of the outputs of heads, in the Open Inference Protocol."""

_BODY: TypeAdapter[bodies.Segmentation | bodies.Detection | bodies.Classification] = TypeAdapter(
    bodies.Finding
)
_VOID = -1


@dataclass(frozen=True)
class Segmentation:
    """A class for each pixel.

    Attributes:
        classes: index of each pixel's class, int32 [h, w].
        labels: names of the classes that occur, by index.
        shares: share of the pixels of each, by name.
    """

    classes: Array
    labels: dict[int, str]
    shares: dict[str, float]

    def __repr__(self) -> str:
        height, width = self.classes.shape
        told = ", ".join(f"{label} {share:.1%}" for label, share in self.shares.items())
        return f"<Segmentation {width} x {height}: {told}>"


@dataclass(frozen=True)
class Detection:
    """Objects, the best first.

    Attributes:
        boxes: float64 [N, 4], (left, top, right, bottom) in the picture's pixels.
        scores: float64 [N], in [0, 1].
        labels: name of each object's class.
        indices: index of each object's class, int64 [N].
        masks: bool [h, w] of each object; None of detectors without masks.
    """

    boxes: Array
    scores: Array
    labels: tuple[str, ...]
    indices: Array
    masks: tuple[Array, ...] | None

    def __repr__(self) -> str:
        first = ", ".join(f"{label} {score:.2f}" for label, score in
                          list(zip(self.labels, self.scores, strict=True))[:3])  # fmt: skip
        more = f" and {len(self.labels) - 3} more" if len(self.labels) > 3 else ""
        return f"<Detection of {len(self.labels)}: {first}{more}>"


@dataclass(frozen=True)
class Classification:
    """The class of a picture.

    Attributes:
        label: name of the class.
        scores: scores by name, the best first.
    """

    label: str
    scores: dict[str, float]


Finding = Segmentation | Detection | Classification
"""The prediction of one head for one picture."""


def read_findings(response: InferResponse) -> list[dict[str, Finding]]:
    """Findings of each picture, by the names of the heads.

    Raises:
        ModelFailureError: the answer holds something else.
    """
    by_head: dict[str, list[Finding]] = {}
    try:
        for name, told in response.outputs.items():
            if not isinstance(told, list):
                raise ValueError(f"output {name!r} is no text")
            by_head[name.removeprefix(HEAD_OUTPUT)] = [_read(text) for text in told]
        names = list(by_head)
        return [dict(zip(names, row, strict=True)) for row in zip(*by_head.values(), strict=True)]
    except (ValueError, KeyError, InvalidRequestError) as error:
        raise ModelFailureError(f"the answer does not tell what heads found: {error}") from error


def _read(text: bytes) -> Finding:
    tree: dict[str, Any] = json.loads(text)
    body = _BODY.validate_python(tree)
    if isinstance(body, bodies.Classification):
        return Classification(body.label, {entry.label: entry.score for entry in body.scores})
    if isinstance(body, bodies.Detection):
        return _detection(body)
    height, width = bodies.PredictedSize.model_validate(tree).source_size
    classes = np.full((height, width), _VOID, np.int32)
    for region in body.regions:
        if region.mask is None:
            raise ValueError(f"region {region.label!r} has no mask")
        classes[decode_mask(region.mask.counts, region.mask.size)] = region.index
    return Segmentation(
        classes,
        {region.index: region.label for region in body.regions},
        {region.label: region.share for region in body.regions},
    )


def _detection(body: bodies.Detection) -> Detection:
    found = body.objects
    masks = [entry.mask for entry in found]
    lengths = [mask for mask in masks if isinstance(mask, bodies.RunLengths)]
    return Detection(
        boxes=np.array([entry.box for entry in found], np.float64).reshape(-1, 4),
        scores=np.array([entry.score for entry in found], np.float64),
        labels=tuple(entry.label for entry in found),
        indices=np.array([entry.index for entry in found], np.int64),
        masks=(
            tuple(decode_mask(mask.counts, mask.size) for mask in lengths)
            if found and len(lengths) == len(found)
            else None
        ),
    )
