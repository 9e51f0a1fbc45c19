"""Features over HTTP, with neither torch nor Ray; numpy arrays come back.

with FeatureClient("http://127.0.0.1:8000") as client:
    vectors = client.embed(["cat.jpg", open("dog.png", "rb").read()], model="mae-photos")
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from serving.codecs import Array
from serving.errors import (
    EndpointError,
    ModelFailureError,
    OverloadedError,
    UnusablePictureError,
    error_from_status,
)
from serving.protocol import HEADER_LENGTH, InferResponse, build_request, parse_response
from trainers.errors import ServingError

Image = bytes | str | Path | Array
"""An encoded picture, a path to one, or uint8 pixels [H, W, C]."""

_BACKOFF_S = 0.25
_MAX_BACKOFF_S = 10.0
_RETRY_STATUSES = (429, 503)


@dataclass(frozen=True)
class Features:
    """Features of one picture, and how they lie over it.

    Attributes:
        pooled: float32 [D].
        tokens: float32 [N, D], row-major over the grid.
        layers: float32 [D, h, w] by layer, as asked for.
        grid: (h, w) of the tokens.
        stride: (vertical, horizontal) pixels of the model's input a token covers.
        source_size: (height, width) of the upright picture, pixels.
        input_size: (height, width) of the model's input, pixels.
        transform: float64 [3, 3], from (x, y, 1) in the picture to the model's input.
        valid_region: (left, top, right, bottom) of the model's input that shows the picture;
            all of it, since pictures are resized whole.
    """

    pooled: Array
    tokens: Array
    layers: dict[int, Array]
    grid: tuple[int, int]
    stride: tuple[float, float]
    source_size: tuple[int, int]
    input_size: tuple[int, int]
    transform: Array
    valid_region: tuple[float, float, float, float]


class FeatureClient:
    """Talks to a mimray endpoint.

    Connection errors and the answers 429 and 503 are tried again, after the time the server
    asks for or with growing pauses.

    Args:
        base_url: where the endpoint answers, e.g. `http://127.0.0.1:8000`.
        api_key: the endpoint's key, if it has one.
        timeout_s: longest wait for a connection and between bytes.
        max_retries: further attempts after the first.
        batch_size: most pictures in one request.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        max_retries: int = 3,
        batch_size: int = 16,
    ) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx2.Client(base_url=base_url, headers=headers, timeout=timeout_s)
        self._max_retries = max_retries
        self._batch_size = batch_size

    def embed(self, images: Iterable[Image], model: str) -> Array:
        """Pooled features of pictures.

        Args:
            images: encoded pictures, paths or uint8 pixels [H, W, C], mixed as you like.
            model: name of the model.

        Returns:
            float32 [B, D], in the order of the pictures.

        Raises:
            UnusablePictureError: pictures that cannot be decoded; `details["pictures"]` names
                them by their index in `images`.
            EndpointError: any other answer that is not features.
        """
        found = self.outputs(images, model, ["pooled"])
        if found:
            return found["pooled"]
        width = next(o for o in self.metadata(model)["outputs"] if o["name"] == "pooled")["shape"]
        return np.empty((0, width[-1]), np.float32)

    def outputs(
        self,
        images: Iterable[Image],
        model: str,
        names: Sequence[str],
        *,
        norm: bool = True,
        size: tuple[int, int] | None = None,
    ) -> dict[str, Array]:
        """Any outputs of many pictures, in requests of `batch_size`.

        Args:
            images: encoded pictures, paths or uint8 pixels [H, W, C].
            model: name of the model.
            names: of `pooled`, `tokens` and `layer_0`, `layer_1`, ….
            norm: apply the final norm to the layers' maps.
            size: (height, width) of the model's input, pixels; the model's own by default.

        Returns:
            Arrays [B, …] by name, in the order of the pictures; nothing for no picture.

        Raises:
            EndpointError: an answer that is not features; see `embed`.
        """
        answers = [
            self._infer(chunk, start, model, names, _parameters(norm, size))
            for start, chunk in _chunks(images, self._batch_size)
        ]
        if not answers:
            return {}
        return {name: np.concatenate([_array(a, name) for a in answers]) for name in names}

    def features(
        self,
        image: Image,
        model: str,
        layers: Sequence[int] = (),
        norm: bool = True,
        size: tuple[int, int] | None = None,
    ) -> Features:
        """Dense features of one picture.

        Args:
            image: an encoded picture, a path or uint8 pixels [H, W, C].
            model: name of the model.
            layers: blocks, counted from 0, whose feature maps are wanted too.
            norm: apply the final norm to those maps.
            size: (height, width) of the model's input, pixels; the model's own by default.
        """
        names = ["pooled", "tokens", "source_size", *(f"layer_{layer}" for layer in layers)]
        response = self._infer([_read(image)], 0, model, names, _parameters(norm, size))
        input_height, input_width = _pair(response, "input_size")
        rows, columns = _pair(response, "grid")
        height, width = (int(side) for side in _array(response, "source_size")[0])
        return Features(
            pooled=_array(response, "pooled")[0],
            tokens=_array(response, "tokens")[0],
            layers={layer: _array(response, f"layer_{layer}")[0] for layer in layers},
            grid=(rows, columns),
            stride=(input_height / rows, input_width / columns),
            source_size=(height, width),
            input_size=(input_height, input_width),
            transform=np.diag([input_width / width, input_height / height, 1.0]),
            valid_region=(0.0, 0.0, float(input_width), float(input_height)),
        )

    def models(self) -> list[str]:
        """Names of the models the endpoint serves."""
        index = self._send("POST", "/v2/repository/index").json()
        return [entry["name"] for entry in index]

    def metadata(self, model: str) -> dict[str, Any]:
        """The protocol's description of a model."""
        metadata: dict[str, Any] = self._send("GET", f"/v2/models/{model}").json()
        return metadata

    def ready(self) -> bool:
        """Whether the endpoint and all its models can answer now."""
        try:
            response = self._http.get("/v2/health/ready")
        except httpx2.TransportError:
            return False
        return bool(response.status_code == 200)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> FeatureClient:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _infer(
        self,
        pictures: Sequence[bytes | Array],
        start: int,
        model: str,
        outputs: Sequence[str],
        parameters: dict[str, str | int | float | bool | None] | None = None,
    ) -> InferResponse:
        """One request; `start` is the index of its first picture in the caller's list."""
        encoded = [picture for picture in pictures if isinstance(picture, bytes)]
        tensor = encoded or np.stack([p for p in pictures if not isinstance(p, bytes)])
        body = build_request({"image": tensor}, outputs, parameters)
        try:
            response = self._send(
                "POST", f"/v2/models/{model}/infer", content=body.content, headers=body.headers
            )
        except UnusablePictureError as error:
            for picture in error.details.get("pictures", []):
                picture["index"] += start
            raise
        return parse_response(response.content, response.headers.get(HEADER_LENGTH))

    def _send(
        self,
        method: str,
        path: str,
        *,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """Send until it is answered, refused for good, or the attempts are spent."""
        for attempt in range(self._max_retries + 1):
            last = attempt == self._max_retries
            pause_s = min(_MAX_BACKOFF_S, _BACKOFF_S * 2**attempt) * random.uniform(0.5, 1.0)
            try:
                response = self._http.request(method, path, content=content, headers=headers)
            except httpx2.TransportError as error:
                if last:
                    where = self._http.base_url
                    raise OverloadedError(
                        f"{where} does not answer: {error}", hint="is it running?"
                    ) from error
                time.sleep(pause_s)
                continue
            if response.status_code < 400:
                return response
            if last or response.status_code not in _RETRY_STATUSES:
                raise _error_of(response)
            wanted = response.headers.get("retry-after", "")
            time.sleep(float(wanted) if wanted.isdigit() else pause_s)
        raise AssertionError("the last attempt returns or raises")


def _parameters(
    norm: bool, size: tuple[int, int] | None
) -> dict[str, str | int | float | bool | None]:
    return {"norm": norm} if size is None else {"norm": norm, "size": f"{size[0]},{size[1]}"}


def _chunks(images: Iterable[Image], size: int) -> Iterator[tuple[int, list[bytes | Array]]]:
    """Consecutive pictures that fit one tensor: all encoded, or all pixels of one shape."""
    start, chunk = 0, list[bytes | Array]()
    for index, image in enumerate(images):
        picture = _read(image)
        if chunk and (len(chunk) == size or _kind(picture) != _kind(chunk[0])):
            yield start, chunk
            start, chunk = index, []
        chunk.append(picture)
    if chunk:
        yield start, chunk


def _kind(picture: bytes | Array) -> tuple[int, ...] | None:
    return None if isinstance(picture, bytes) else picture.shape


def _read(image: Image) -> bytes | Array:
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        try:
            return Path(image).read_bytes()
        except OSError as error:
            raise ServingError(f"{image} cannot be read: {error.strerror}") from error
    if image.dtype != np.uint8 or image.ndim != 3:
        raise ServingError(
            f"an array of {image.dtype} {list(image.shape)} is no picture",
            hint="give uint8 [H, W, C]",
        )
    return image


def _array(response: InferResponse, name: str) -> Array:
    tensor = response.outputs.get(name)
    if not isinstance(tensor, np.ndarray):
        raise ModelFailureError(f"the answer holds no output {name!r}")
    return tensor


def _pair(response: InferResponse, name: str) -> tuple[int, int]:
    """A parameter `rows,columns` of the answer."""
    first, second = str(response.parameters[name]).split(",")
    return int(first), int(second)


def _error_of(response: Any) -> EndpointError:
    """The server's refusal as the exception it raised there."""
    try:
        problem = response.json()
        message = str(problem["error"])
    except (ValueError, TypeError, KeyError):
        problem, message = {}, response.text.strip()[:200]
    details = {key: value for key, value in problem.items() if key == "pictures"}
    return error_from_status(response.status_code, message or "no reason given", details)
