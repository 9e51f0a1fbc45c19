"""`/v1/embeddings`, in the words of OpenAI's API: pictures as text in, pooled vectors out.

Source: OpenAI's API reference, "Create embeddings".
"""

from __future__ import annotations

import base64
from typing import Any

from mimray.serving.inference.options import parse_options
from mimray.serving.inference.timeline import Timeline
from mimray.serving.operations.calls import Call, Reply
from mimray.serving.operations.operation import Computation, Model
from mimray.serving.operations.request_images import decoded_pictures, parse_object
from mimray.serving.operations.response_formats import dumps
from mimray.serving.wire.errors import InvalidRequestError

_OPTIONS = ("pooling", "size")
# `user` is OpenAI's name of a person behind a client; nothing here depends on it.
_MEMBERS = ("model", "input", "encoding_format", "dimensions", "user", *_OPTIONS)


async def _embeddings(model: Model, call: Call, timeline: Timeline) -> tuple[Reply, int]:
    asked = {name: value for name, value in parse_object(call.body).items() if value is not None}
    unknown = asked.keys() - set(_MEMBERS)
    if unknown:
        raise InvalidRequestError(
            f"there is no member {min(unknown)[:40]!r}", hint=f"there are {list(_MEMBERS)}"
        )
    encoding = asked.get("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise InvalidRequestError(
            f"`encoding_format` is {str(encoding)[:40]!r}", hint="use float or base64"
        )
    width = model.info.width
    if asked.get("dimensions") not in (None, width):
        raise InvalidRequestError(
            f"`dimensions` is {str(asked['dimensions'])[:40]}, this model has {width}",
            hint="leave it out",
        )
    options = parse_options({name: asked[name] for name in _OPTIONS if name in asked}, model.info)
    given = asked.get("input")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InvalidRequestError(
            "`input` must be a picture as text, or a list of such", hint="a data URI or base64"
        )
    pictures = await decoded_pictures(texts, model.urls, max_pictures=model.limits.pictures)
    predictions = await model.predictor.predict(pictures, options, timeline)
    vectors = [prediction.outputs["pooled"].astype("<f4") for prediction in predictions]
    answer: dict[str, Any] = {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": (
                    vector.tolist()
                    if encoding == "float"
                    else base64.b64encode(vector.tobytes()).decode("ascii")
                ),
            }
            for index, vector in enumerate(vectors)
        ],
        "model": model.name,
        "usage": {"prompt_tokens": 0, "total_tokens": 0},
    }
    headers = {"Content-Type": "application/json"}
    return Reply(200, headers, dumps(answer).encode()), len(pictures)


EMBEDDINGS = Computation(
    name="embeddings",
    path="/v1/embeddings",
    summary="Pooled vectors, in the words of OpenAI's API",
    compute=_embeddings,
    model_in="body",
)
