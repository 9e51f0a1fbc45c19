"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
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

T = TypeVar("T")


class AsyncFeatureClient(Client):
    """`FeatureClient` for asyncio; its methods are described there.

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

    _http_class = httpx2.AsyncClient

    async def embed(
        self,
        images: Iterable[Image],
        model: str,
        pooling: Pooling | None = None,
        size: Size | None = None,
        concurrency: int = 4,
    ) -> Array:
        """Compute pooled features of pictures, float32 [B, D]."""
        return await self._run(self._core.embed(images, model, pooling, size, concurrency))

    async def outputs(
        self,
        images: Iterable[Image],
        model: str,
        names: Sequence[str],
        *,
        norm: bool = True,
        size: Size | None = None,
        concurrency: int = 4,
    ) -> dict[str, Array]:
        """Compute any outputs of many pictures, arrays [B, …] by name."""
        return await self._run(self._core.outputs(images, model, names, norm, size, concurrency))

    async def features(
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
        """Compute dense features of one picture."""
        parameters = feature_parameters(layers, pooling, norm, pyramid, size, dtype)
        return await self._run(self._core.features(image, model, parameters))

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
    ) -> AsyncIterator[Features]:
        """Compute dense features of many pictures, in order."""
        parameters = feature_parameters(layers, pooling, norm, pyramid, size, dtype)
        return self._each(self._core.features_many(images, model, parameters, concurrency))

    async def predict(
        self,
        images: Iterable[Image],
        model: str,
        heads: Sequence[str] = (),
        min_score: float | None = None,
        top: int | None = None,
        concurrency: int = 4,
    ) -> list[dict[str, Finding]]:
        """Have trained heads look at pictures: classes of pixels, objects, classes of pictures."""
        steps = self._core.predict(images, model, heads, min_score, top, concurrency)
        return await self._run(steps)

    async def reconstruct(
        self, image: Image, model: str, mask_ratio: float | None = None, seed: int = 0
    ) -> Reconstruction:
        """Hide a part of a picture and have the model predict it."""
        return await self._run(self._core.reconstruct(image, model, mask_ratio, seed))

    async def models(self) -> list[str]:
        """The names of the models that the endpoint serves."""
        return await self._run(self._core.models())

    async def model(self, name: str) -> dict[str, Any]:
        """The endpoint's description of a model."""
        return await self._run(self._core.model(name))

    async def metadata(self, model: str) -> dict[str, Any]:
        """The Open Inference Protocol's description of a model."""
        return await self._run(self._core.metadata(model))

    async def ready(self) -> bool:
        """True if the endpoint and all its models can answer now."""
        return await self._run(self._core.healthy(READY))

    async def live(self) -> bool:
        """True if the endpoint runs."""
        return await self._run(self._core.healthy(LIVE))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncFeatureClient:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def _run(self, steps: Steps[T]) -> T:
        outcome: Any = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                result: T = end.value
                return result
            match step:
                case Send():
                    outcome = await self._send(step)
                case Load(function):
                    outcome = await asyncio.to_thread(function)
                case All():
                    outcome = [result async for result in self._each(step)]
                case Pause(seconds):
                    outcome = None
                    await asyncio.sleep(seconds)

    async def _each(self, batch: All[T]) -> AsyncIterator[T]:
        turns = asyncio.Semaphore(batch.concurrency)

        async def run(branch: Steps[T]) -> T:
            async with turns:
                return await self._run(branch)

        waiting: deque[asyncio.Task[T]] = deque()
        try:
            for branch in batch.branches:
                waiting.append(asyncio.create_task(run(branch)))
                if len(waiting) == 2 * batch.concurrency:
                    yield await waiting.popleft()
            while waiting:
                yield await waiting.popleft()
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _send(self, send: Send) -> Answer | Failure:
        async def answered() -> Answer:
            async with self._http.stream(**self._arguments(send)) as response:
                parts = [part async for part in response.aiter_bytes()]
            return Answer(response.status_code, response.headers, bytearray().join(parts))

        # `asyncio.timeout`, and one name for the error, came after Python 3.10, which the client
        # as a distribution of its own runs on.
        try:
            return await asyncio.wait_for(answered(), send.left_s)
        except (httpx2.RequestError, TimeoutError, asyncio.TimeoutError) as error:  # noqa: UP041
            return Failure(error)
