"""The operations of a client as steps: requests and readings of answers; no network here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import numpy as np

from mimray.serving.client.findings import HEAD_OUTPUT, Finding, read_findings
from mimray.serving.client.images import Chunk, Image, chunks, picture_file
from mimray.serving.client.results import (
    Features,
    Reconstruction,
    read_features,
    read_outputs,
    read_reconstruction,
)
from mimray.serving.client.retries import Sender
from mimray.serving.client.steps import All, Answer, Load, Steps, gather
from mimray.serving.wire.bodies import Parameters
from mimray.serving.wire.codecs import Array
from mimray.serving.wire.errors import EndpointError, ModelFailureError
from mimray.serving.wire.oip_messages import (
    HEADER_LENGTH,
    InferResponse,
    build_request,
    parse_response,
)
from mimray.trainers.errors import ServingError

T = TypeVar("T")
Size = int | tuple[int, int] | str
"""Side of a square, (height, width), or a word: `keep`, `keep:1024`, `native`."""


class Core:
    """The operations; see `FeatureClient` for what they mean.

    Args:
        sender: sends requests.
        batch_size: most pictures in one request.
    """

    def __init__(self, sender: Sender, batch_size: int) -> None:
        if batch_size < 1:
            raise ServingError(f"batch_size is {batch_size}", hint="use at least 1")
        self._sender = sender
        self._batch_size = batch_size

    def embed(
        self,
        images: Iterable[Image],
        model: str,
        pooling: str | None,
        size: Size | None,
        concurrency: int,
    ) -> Steps[Array]:
        """Pooled vectors of pictures."""
        parameters = _parameters(pooling=pooling, size=size)
        found = yield from self._outputs(images, model, ["pooled"], parameters, concurrency)
        if found:
            return found["pooled"]
        metadata = yield from self.metadata(model)
        try:
            shapes = {output["name"]: output["shape"] for output in metadata["outputs"]}
            return np.empty((0, shapes["pooled"][-1]), np.float32)
        except (KeyError, TypeError) as error:
            raise ModelFailureError(f"{model} does not describe its outputs") from error

    def outputs(
        self,
        images: Iterable[Image],
        model: str,
        names: Sequence[str],
        norm: bool,
        size: Size | None,
        concurrency: int,
    ) -> Steps[dict[str, Array]]:
        """Any outputs of pictures, by name."""
        parameters = _parameters(norm=norm, size=size)
        return self._outputs(images, model, names, parameters, concurrency)

    def features(self, image: Image, model: str, parameters: Parameters) -> Steps[Features]:
        """Dense features of one picture; `parameters` by `feature_parameters`."""
        (chunk,) = chunks([image], 1)
        return (yield from self._infer(chunk, model, (), parameters, read_features))

    def features_many(
        self, images: Iterable[Image], model: str, parameters: Parameters, concurrency: int
    ) -> All[Features]:
        """Dense features of pictures, one request each: the endpoint batches what fits."""
        branches = (
            _shifted(index, self.features(image, model, parameters))
            for index, image in enumerate(images)
        )
        return All(branches, concurrency)

    def predict(
        self,
        images: Iterable[Image],
        model: str,
        heads: Sequence[str],
        min_score: float | None,
        top: int | None,
        concurrency: int,
    ) -> Steps[list[dict[str, Finding]]]:
        """Predictions of heads for pictures, by the names of the heads."""
        if not heads:
            heads = (yield from self.model(model)).get("heads") or ()
            if not heads:
                raise ServingError(
                    f"{model} is served without a trained head", hint="`mimray serve --head`"
                )
        names = [f"{HEAD_OUTPUT}{name}" for name in heads]
        parameters = _parameters(min_score=min_score, top=top)
        branches = (
            _shifted(chunk.start, self._infer(chunk, model, names, parameters, read_findings))
            for chunk in chunks(images, self._batch_size)
        )
        answers = yield from gather(branches, concurrency)
        return [picture for answer in answers for picture in answer]

    def reconstruct(
        self, image: Image, model: str, mask_ratio: float | None, seed: int
    ) -> Steps[Reconstruction]:
        """The model's prediction of a picture's hidden part."""
        query = {"model": model, "seed": seed} | (
            {} if mask_ratio is None else {"mask_ratio": mask_ratio}
        )
        body = yield Load(lambda: picture_file(image))
        answer = yield from self._sender.request(
            "POST",
            f"/v1/reconstruct?{urlencode(query)}",
            body,
            {"Content-Type": "application/octet-stream"},
        )
        return read_reconstruction(_json(answer))

    def models(self) -> Steps[list[str]]:
        """Names of the models."""
        index = _json((yield from self._sender.request("POST", "/v2/repository/index")))
        if isinstance(index, list) and all(isinstance(e, dict) and "name" in e for e in index):
            return [str(entry["name"]) for entry in index]
        raise ModelFailureError("the answer is no index of models")

    def model(self, name: str) -> Steps[dict[str, Any]]:
        """The endpoint's description of a model."""
        return self._object(f"/v1/models/{_segment(name)}")

    def metadata(self, name: str) -> Steps[dict[str, Any]]:
        """The protocol's description of a model."""
        return self._object(f"/v2/models/{_segment(name)}")

    def healthy(self, path: str) -> Steps[bool]:
        """True if one request to `path` is answered with 200."""
        outcome = yield self._sender.attempt("GET", path, None, {}, self._sender.deadline_s)
        return isinstance(outcome, Answer) and outcome.status == 200

    def _object(self, path: str) -> Steps[dict[str, Any]]:
        tree = _json((yield from self._sender.request("GET", path)))
        if not isinstance(tree, dict):
            raise ModelFailureError(f"the answer to {path} is no JSON object")
        return tree

    def _outputs(
        self,
        images: Iterable[Image],
        model: str,
        names: Sequence[str],
        parameters: Parameters,
        concurrency: int,
    ) -> Steps[dict[str, Array]]:
        branches = (
            _shifted(chunk.start, self._infer(chunk, model, names, parameters, read_outputs))
            for chunk in chunks(images, self._batch_size)
        )
        answers = yield from gather(branches, concurrency)
        for name in names:
            if any(name not in answer for answer in answers):
                raise ModelFailureError(f"the answer holds no output {name!r}")
        if not answers:
            return {}
        if len(answers) == 1:
            return {name: answers[0][name] for name in names}
        return {name: np.concatenate([answer[name] for answer in answers]) for name in names}

    def _infer(
        self,
        chunk: Chunk,
        model: str,
        names: Sequence[str],
        parameters: Parameters,
        read: Callable[[InferResponse], T],
    ) -> Steps[T]:
        body = yield Load(lambda: build_request({"image": chunk.tensor()}, names, parameters))
        path = f"/v2/models/{_segment(model)}/infer"
        answer = yield from self._sender.request("POST", path, body.content, body.headers)
        result: T = yield Load(lambda: read(self._parsed(answer)))
        return result

    def _parsed(self, answer: Answer) -> InferResponse:
        try:
            return parse_response(answer.content, answer.headers.get(HEADER_LENGTH.lower()))
        except EndpointError as error:
            raise ModelFailureError(
                f"the answer is not of the protocol: {error}",
                hint=f"is {self._sender.base_url} a mimray endpoint?",
            ) from error


def feature_parameters(
    layers: Sequence[int],
    pooling: str | None,
    norm: bool,
    pyramid: bool,
    size: Size | None,
    dtype: str,
) -> Parameters:
    """The protocol's request parameters for pooled, tokens and the maps asked for."""
    return _parameters(
        layers=",".join(map(str, layers)) or None,
        pooling=pooling,
        norm=norm,
        pyramid=pyramid or None,
        size=size,
        dtype=None if dtype == "float32" else dtype,
        binary_data_output=True,
    )


def request_headers(api_key: str | None) -> dict[str, str]:
    """Headers of every request; the key is the one given, or `MIMRAY_API_KEY`."""
    key = os.environ.get("MIMRAY_API_KEY", "") if api_key is None else api_key
    if not key:
        return {}
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ServingError(
            "the API key holds spaces or other characters that a header cannot carry",
            hint="a line's end comes along when a file is read",
        )
    return {"Authorization": f"Bearer {key}"}


def _shifted(start: int, steps: Steps[T]) -> Steps[T]:
    """Steps whose errors count pictures from the caller's first one."""
    try:
        return (yield from steps)
    except EndpointError as error:
        pictures = error.details.get("pictures")
        if not start or not isinstance(pictures, list):
            raise
        for picture in pictures:
            if isinstance(picture, dict) and isinstance(picture.get("index"), int):
                index = picture["index"]
                picture["index"] = start + index
                message = str(error.args[0])
                if message.startswith(f"picture {index} "):
                    error.args = (message.replace(str(index), str(start + index), 1),)
        raise


def _parameters(
    *, size: Size | None = None, **others: str | int | float | bool | None
) -> Parameters:
    if isinstance(size, tuple):
        size = f"{size[0]},{size[1]}"
    named = {**others, "size": None if size is None else str(size)}
    return {name: value for name, value in named.items() if value is not None}


def _segment(name: str) -> str:
    return quote(name, safe="")


def _json(answer: Answer) -> Any:
    try:
        return json.loads(answer.content)
    except (ValueError, RecursionError) as error:
        raise ModelFailureError(f"the answer is not JSON: {error}") from error
