"""`/v1/reconstruct`: hide a part of a picture and show what the method predicts there."""

from __future__ import annotations

from mimray.serving.inference.timeline import Timeline
from mimray.serving.operations.calls import Call, Reply
from mimray.serving.operations.operation import Computation, Model
from mimray.serving.operations.request_images import read_pictures
from mimray.serving.operations.response_formats import dumps
from mimray.serving.wire.errors import ConflictError, InvalidRequestError

_QUERY = ("model", "version", "mask_ratio", "seed")


async def _reconstruct(model: Model, call: Call, timeline: Timeline) -> tuple[Reply, int]:
    reconstructor = model.reconstructor
    if not reconstructor.available:
        raise ConflictError(
            "this bundle was exported without its decoder", hint="serve the run's own bundle"
        )
    unknown = call.query.keys() - set(_QUERY)
    if unknown:
        raise InvalidRequestError(
            f"there is no parameter {sorted(unknown)[0][:40]!r}", hint=f"there are {list(_QUERY)}"
        )
    ratio, seed = _ratio(call.query.get("mask_ratio")), _seed(call.query.get("seed"))
    pictures = await read_pictures(call, model.urls, max_pictures=1)
    (image,) = await model.predictor.decode(pictures, timeline)
    picture = image.convert("RGB")
    tree = await model.predictor.alone(lambda: reconstructor.draw(picture, ratio, seed), timeline)
    return Reply(200, {"Content-Type": "application/json"}, dumps(tree).encode()), 1


RECONSTRUCT = Computation(
    name="reconstruct",
    path="/v1/reconstruct",
    summary="Hide a part of a picture and predict it",
    compute=_reconstruct,
    model_in="query",
)


def _ratio(text: str | None) -> float | None:
    if not text:
        return None
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1.0
    if not 0 < ratio < 1:
        raise InvalidRequestError(
            f"parameter `mask_ratio` is {text[:40]!r}", hint="use a number between 0 and 1"
        )
    return ratio


def _seed(text: str | None) -> int:
    if not text:
        return 0
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise InvalidRequestError(
            f"parameter `seed` is {text[:40]!r}", hint="use a whole number of at most 9 digits"
        )
    return int(text)
