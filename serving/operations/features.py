"""`/v1/features`: pictures in as bodies or forms, features out in the format that is accepted."""

from __future__ import annotations

from mimray.serving.inference.options import NAMES, Options, parse_options
from mimray.serving.inference.timeline import Timeline
from mimray.serving.operations.calls import Call, Reply
from mimray.serving.operations.metadata import answer_metadata
from mimray.serving.operations.operation import Computation, Model
from mimray.serving.operations.request_images import read_pictures
from mimray.serving.operations.response_formats import WRITERS, Answer, negotiate
from mimray.serving.wire.errors import InvalidRequestError

_QUERY = ("model", "version", "outputs", *NAMES)
_PLAIN = ("pooled", "tokens")


async def _features(model: Model, call: Call, timeline: Timeline) -> tuple[Reply, int]:
    media = negotiate(call.headers.get("accept", ""))
    options = _options(call, model)
    pictures = await read_pictures(call, model.urls, max_pictures=model.limits.pictures)
    predictions = await model.predictor.predict(pictures, options, timeline)
    names = tuple(
        name
        for output in options.names
        for name in ((output, f"{output}_scale") if options.dtype == "int8" else (output,))
    )
    answer = Answer(names, predictions, answer_metadata(model, options, predictions))
    body, headers = WRITERS[media](answer)
    return Reply(200, {"Content-Type": media, "Vary": "Accept", **headers}, body), len(pictures)


FEATURES = Computation(
    name="features",
    path="/v1/features",
    summary="Features of pictures",
    compute=_features,
    model_in="query",
)


def _options(call: Call, model: Model) -> Options:
    unknown = call.query.keys() - set(_QUERY)
    if unknown:
        raise InvalidRequestError(
            f"there is no parameter {sorted(unknown)[0][:40]!r}", hint=f"there are {list(_QUERY)}"
        )
    wanted = [word.strip() for word in call.query.get("outputs", "").split(",") if word.strip()]
    plain = [word for word in wanted if word in _PLAIN]
    if len(plain) == len(wanted):
        # Maps are asked for by `layers` and `pyramid`; where they are, nothing else is implied.
        maps = call.query.get("layers") or call.query.get("pyramid")
        default = plain if wanted else (() if maps else ("pooled",))
        return parse_options(call.query, model.info, default=default)
    return parse_options(call.query, model.info, outputs=wanted)
