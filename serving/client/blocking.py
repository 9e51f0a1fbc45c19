"""The client that blocks."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, TypeVar

import httpx2

from mimray.serving.client.base import LIVE, READY, Client
from mimray.serving.client.core import Size, feature_parameters
from mimray.serving.client.findings import Finding
from mimray.serving.client.images import Image
from mimray.serving.client.results import Features, Reconstruction
from mimray.serving.client.steps import All, Answer, Failure, Load, Pause, Send, Steps
from mimray.serving.wire.bodies import Dtype, Pooling
from mimray.serving.wire.codecs import Array
from mimray.trainers.errors import ServingError

T = TypeVar("T")


class FeatureClient(Client):
    """Talks to a mimray endpoint; threads may share one.

    When no answer comes, or 429 or 503, a request is sent again, after the time the server asks
    for or with growing, random pauses. A refusal is raised as the exception it was at the server.

    Args:
        base_url: the endpoint's address, e.g. `http://127.0.0.1:8000`.
        api_key: the endpoint's key; `MIMRAY_API_KEY` by default.
        timeout_s: longest wait for a connection and between bytes.
        max_retries: further attempts after the first.
        batch_size: most pictures in one request.
        deadline_s: longest time for a request, its retries and pauses included.
        headers: sent with every request, or a function that makes them, e.g. for `traceparent`.
        transport: a transport of httpx2, for other ways than TCP.
    """

    _http_class = httpx2.Client

    def embed(
        self,
        images: Iterable[Image],
        model: str,
        pooling: Pooling | None = None,
        size: Size | None = None,
        concurrency: int = 4,
    ) -> Array:
        """Compute pooled features of pictures.

        Args:
            images: encoded pictures, paths or uint8 pixels [H, W, C], in any mixture. A string is
                a path.
            model: name of the model.
            pooling: the way that tokens become one vector; the model's own by default.
            size: size of the model's input: side of a square, (height, width), or `keep`,
                `keep:1024` or `native`; the size it was trained at by default.
            concurrency: most requests at once.

        Returns:
            float32 [B, D], in the order of the pictures.

        Raises:
            UnusablePictureError: pictures that cannot be decoded; `details["pictures"]` names
                them by their index in `images`.
            EndpointError: any other answer that is not features.
        """
        return self._run(self._core.embed(images, model, pooling, size, concurrency))

    def outputs(
        self,
        images: Iterable[Image],
        model: str,
        names: Sequence[str],
        *,
        norm: bool = True,
        size: Size | None = None,
        concurrency: int = 4,
    ) -> dict[str, Array]:
        """Compute any outputs of many pictures, in requests of `batch_size`.

        Args:
            images: the pictures, as for `embed`.
            model: name of the model.
            names: names of outputs: `pooled`, `tokens`, `layer_0`, `layer_1`, … and `pyramid_4` to
                `pyramid_32`.
            norm: apply the final norm to maps.
            size: size of the model's input, as for `embed`.
            concurrency: most requests at once.

        Returns:
            Arrays [B, …] by name, in the order of the pictures; nothing for no picture.

        Raises:
            EndpointError: an answer that is not features; see `embed`.
        """
        return self._run(self._core.outputs(images, model, names, norm, size, concurrency))

    def features(
        self,
        image: Image,
        model: str,
        layers: Sequence[int] = (),
        pooling: Pooling | None = None,
        norm: bool = True,
        pyramid: bool = False,
        size: Size | None = None,
        dtype: Dtype = "float32",
    ) -> Features:
        """Compute dense features of one picture.

        Args:
            image: an encoded picture, a path or uint8 pixels [H, W, C].
            model: name of the model.
            layers: layers whose maps are wanted too, counted from 0, or from the end below 0.
            pooling: the way that tokens become one vector; the model's own by default.
            norm: apply the final norm to maps.
            pyramid: add maps of strides 4, 8, 16 and 32, derived from the last of `layers`.
            size: size of the model's input, as for `embed`.
            dtype: type of the numbers on the wire; bfloat16 and int8 come back as float32.

        Raises:
            EndpointError: an answer that is not features; see `embed`.
        """
        parameters = feature_parameters(layers, pooling, norm, pyramid, size, dtype)
        return self._run(self._core.features(image, model, parameters))

    def features_many(
        self,
        images: Iterable[Image],
        model: str,
        layers: Sequence[int] = (),
        pooling: Pooling | None = None,
        norm: bool = True,
        pyramid: bool = False,
        size: Size | None = None,
        dtype: Dtype = "float32",
        concurrency: int = 4,
    ) -> Iterator[Features]:
        """Compute dense features of many pictures, in order, each when those before are there.

        At most `2 * concurrency` pictures and answers are held at a time. See `features` for the
        arguments.
        """
        parameters = feature_parameters(layers, pooling, norm, pyramid, size, dtype)
        return self._each(self._core.features_many(images, model, parameters, concurrency))

    def predict(
        self,
        images: Iterable[Image],
        model: str,
        heads: Sequence[str] = (),
        min_score: float | None = None,
        top: int | None = None,
        concurrency: int = 4,
    ) -> list[dict[str, Finding]]:
        """Have trained heads look at pictures: classes of pixels, objects, classes of pictures.

        Args:
            images: the pictures, as for `embed`.
            model: name of the model.
            heads: names of the heads; all that the model is served with by default.
            min_score: objects and classes below it are left out.
            top: most objects, and most classes with a score.
            concurrency: most requests at once.

        Returns:
            What each head found on each picture, in their order, by the names of the heads.

        Raises:
            EndpointError: the model has no such head, or another refusal.
        """
        return self._run(self._core.predict(images, model, heads, min_score, top, concurrency))

    def reconstruct(
        self, image: Image, model: str, mask_ratio: float | None = None, seed: int = 0
    ) -> Reconstruction:
        """Hide a part of a picture and have the model predict it.

        Args:
            image: the picture, as for `features`.
            model: name of a model that is served with its decoder.
            mask_ratio: the part to hide, 0 to 1; the method's own by default.
            seed: seed of the mask.

        Raises:
            EndpointError: the model has no decoder, or another refusal.
        """
        return self._run(self._core.reconstruct(image, model, mask_ratio, seed))

    def models(self) -> list[str]:
        """The names of the models that the endpoint serves."""
        return self._run(self._core.models())

    def model(self, name: str) -> dict[str, Any]:
        """The endpoint's description of a model: version, depth, strides, mean, std, limits, …."""
        return self._run(self._core.model(name))

    def metadata(self, model: str) -> dict[str, Any]:
        """The Open Inference Protocol's description of a model."""
        return self._run(self._core.metadata(model))

    def ready(self) -> bool:
        """True if the endpoint and all its models can answer now."""
        return self._run(self._core.healthy(READY))

    def live(self) -> bool:
        """True if the endpoint runs."""
        return self._run(self._core.healthy(LIVE))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> FeatureClient:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _run(self, steps: Steps[T], stop: threading.Event | None = None) -> T:
        outcome: Any = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                result: T = end.value
                return result
            match step:
                case Send():
                    outcome = self._send(step)
                case Load(function):
                    outcome = function()
                case All():
                    outcome = list(self._each(step))
                case Pause(seconds) if stop is None:
                    outcome = None
                    time.sleep(seconds)
                case Pause(seconds):
                    if stop.wait(seconds):
                        raise ServingError("stopped, since another request failed")
                    outcome = None

    def _each(self, batch: All[T]) -> Iterator[T]:
        stop = threading.Event()
        waiting: deque[Future[T]] = deque()
        with ThreadPoolExecutor(batch.concurrency, "mimray-client") as pool:
            try:
                for branch in batch.branches:
                    # The caller's context holds the trace that `headers` may ask for.
                    waiting.append(pool.submit(copy_context().run, self._run, branch, stop))
                    if len(waiting) == 2 * batch.concurrency:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                stop.set()
                for future in waiting:
                    future.cancel()

    def _send(self, send: Send) -> Answer | Failure:
        end = time.monotonic() + send.left_s
        parts: list[bytes] = []
        try:
            with self._http.stream(**self._arguments(send)) as response:
                for part in response.iter_bytes():
                    parts.append(part)
                    if time.monotonic() > end:
                        raise httpx2.ReadTimeout("the answer took too long")
        except httpx2.RequestError as error:
            return Failure(error)
        return Answer(response.status_code, response.headers, bytearray().join(parts))
