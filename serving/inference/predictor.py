"""Pictures in, features out, with no protocol around it.

Decoding runs in threads beside the model; prepared pictures are grouped by shape and options;
a picture that cannot be used fails alone.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from mimray.serving.config import MIB, Limits, ReplicaConfig
from mimray.serving.inference.batcher import Batcher
from mimray.serving.inference.decoders import Decoders
from mimray.serving.inference.devices import pick_device, torch_threads, what_pays
from mimray.serving.inference.heads import Head, HeadSet
from mimray.serving.inference.options import EncoderInfo, Options
from mimray.serving.inference.placement import Sizing
from mimray.serving.inference.preprocess import (
    Array,
    Picture,
    Prepared,
    Preparer,
    token_validity,
)
from mimray.serving.inference.timeline import Timeline
from mimray.serving.wire.errors import (
    EndpointError,
    ModelFailureError,
    OverloadedError,
    TooLargeError,
)
from mimray.trainers.data.geometry import Placement, Size, whole_view

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from mimray.trainers.bundles import BundleCard

Result = TypeVar("Result")

_ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
# How much the newest batch counts in the estimate of what a picture costs.
_SMOOTHING = 0.2
# Two passes of half the threads each outrun one of all threads (1.1 to 1.2 times for ViT-Ti on 2
# cores): threads of one pass wait for each other at every operation, and longer when decoding takes
# a core from one of them.
_LANES = 2
# Longest that prepared pictures wait for those still being decoded.
_MAX_PATIENCE_S = 0.1
_MAX_RETRY_AFTER_S = 60


class Prediction(NamedTuple):
    """Features of one picture.

    Attributes:
        outputs: the outputs by name, `pooled` [D], `tokens` [N, D], maps [D, h, w], of the dtype
            asked for; bfloat16 as the uint16 that holds its bits. Of heads what `Head.compute`
            made.
        placement: the picture's place in the model's input.
    """

    outputs: dict[str, Any]
    placement: Placement


class _Key(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    options: Options


class _Waiting(NamedTuple):
    prepared: Prepared
    since: float
    timeline: Timeline


class Predictor:
    """A frozen encoder that runs the pictures of all requests in batches.

    Args:
        bundle: the bundle's directory.
        config: the model's configuration, as in `serve.yaml`.
        limits: the endpoint's limits, as in `serve.yaml`.
        num_threads: CPU threads of the model; Ray sets OMP_NUM_THREADS to 1, so they are set here.
        on_batch: called after every batch with its size and the pixels of its inputs.

    Attributes:
        card: the bundle's description, bundle.json.
        info: the encoder's dimensions, which options are checked against.
        heads: the trained heads on the encoder.
        waiting: number of pictures admitted and not yet answered.
    """

    def __init__(
        self,
        bundle: Path,
        config: ReplicaConfig,
        limits: Limits,
        *,
        num_threads: int = 1,
        on_batch: Callable[[int, int], None] = lambda size, pixels: None,
    ) -> None:
        import torch

        from mimray.trainers.bundles import fetch_folder, load_bundle

        self._config = config
        self._limits = limits
        self._device = pick_device(config.device)
        # One for the whole model, and one for each lane; at any time either the one is in use or
        # the others. The one loads the model, too: once OpenMP has more workers than cores, they
        # sleep between operations (a picture took ViT-Ti 37 ms instead of 25 on 2 cores).
        self._model_thread = torch_threads(1, "model", num_threads=num_threads)
        loading = self._model_thread.submit(lambda: load_bundle(bundle).to(self._device))
        self._encoder = loading.result()
        folders = {name: fetch_folder(place) for name, place in config.heads.items()}
        self.heads = self._model_thread.submit(
            HeadSet, folders, self._encoder, str(self._device)
        ).result()
        self.card: BundleCard = self._encoder.card
        encoder = self._encoder.encoder
        self.info = EncoderInfo(
            depth=encoder.depth,
            width=encoder.width,
            stride=encoder.stride,
            strides=tuple(encoder.strides),
            widths=tuple(encoder.widths),
            trained=self.card.image_size,
            pooling=self.card.pooling,
            has_class_token=self.card.has_class_token,
            max_input_pixels=limits.input_pixels,
        )
        self._faster = what_pays(config.compile, self._device)
        self.waiting = 0
        self._seconds_per_picture = 0.0
        self._on_batch = on_batch
        self._mean, self._std = (
            torch.tensor(values, device=self._device).view(1, -1, 1, 1)
            for values in (self.card.mean, self.card.std)
        )
        self._preparer = Preparer(self.card, encoder.stride, limits, draft=config.jpeg_draft)
        self._decoders = Decoders(max(2, num_threads), limits.request_pixels)
        lanes = _LANES if self._device.type == "cpu" and num_threads >= _LANES else 1
        self._lanes = torch_threads(lanes, "lane", num_threads=num_threads // lanes)
        self._num_lanes = lanes
        self._batcher: Batcher[_Key, _Waiting, Prediction] = Batcher(
            self._run_batch,
            max_batch_size=config.max_batch_size,
            batch_wait_s=config.batch_wait_ms / 1000,
            lanes=lanes,
            patience_s=self._patience_s,
        )

    def warm_up(self) -> None:
        """Make the model faster, run it twice and time it, so that no request waits for this."""
        size = self.card.image_size
        if self._faster is not None:
            self._model_thread.submit(self._faster, self._encoder).result()
        blank = np.zeros((self.card.channels, *size), np.uint8)
        item = Prepared(blank, whole_view(size, size))
        options = Options(tokens=True, layers=(self.info.depth - 1,))
        for _ in range(2):
            started = time.perf_counter()
            self._model_thread.submit(self._forward, [item], options).result()
        self._seconds_per_picture = time.perf_counter() - started
        for name in self.heads:
            size = self.heads[name].input_size
            view = Prepared(np.zeros((self.card.channels, *size), np.uint8), whole_view(size, size))
            self._model_thread.submit(self._forward, [view], Options(heads=(name,))).result()

    async def predict(
        self, pictures: Sequence[Picture], options: Options, timeline: Timeline | None = None
    ) -> list[Prediction]:
        """Compute the features of every picture, in order.

        Args:
            pictures: the pictures, each in one of the forms of `Picture`.
            options: the outputs to compute.
            timeline: gets the phases; None for no one.

        Raises:
            UnusablePictureError: some pictures cannot be used; it lists all of them.
            TooLargeError: the answer would be too large.
            OverloadedError: too many pictures are waiting already.
            ModelFailureError: the model failed.
        """
        self.admit(len(pictures))
        timeline = timeline or Timeline()
        self.waiting += len(pictures)
        try:
            with self._batcher.expecting(len(pictures)):
                prepared = await self._decoders.prepare(
                    pictures, lambda picture: self._prepare(picture, options.sizing), timeline
                )
            self._check_output(prepared, options)
            now = time.perf_counter()
            return await asyncio.gather(
                *(
                    self._batcher.submit(
                        _Key(item.pixels.shape, item.pixels.dtype.str, options),
                        _Waiting(item, now, timeline),
                    )
                    for item in prepared
                )
            )
        finally:
            self.waiting -= len(pictures)

    def admit(self, count: int) -> None:
        """Refuse pictures if too many wait already; an empty queue always admits.

        Args:
            count: number of further pictures.

        Raises:
            OverloadedError: the queue is full, or the wait would be too long.
        """
        wait_s = self.waiting * self._seconds_per_picture
        full = self.waiting and self.waiting + count > self._config.max_queue_size
        if full or wait_s > self._config.max_wait_s:
            raise OverloadedError(
                f"{self.waiting} pictures are waiting already",
                retry_after_s=max(1, min(_MAX_RETRY_AFTER_S, math.ceil(wait_s / 2))),
            )

    async def find(
        self,
        pictures: Sequence[Picture],
        names: Sequence[str],
        render: Callable[[Size, dict[str, Any]], Result],
        timeline: Timeline | None = None,
    ) -> list[Result]:
        """Have trained heads look at every picture, in order.

        Heads that see the same view of a picture share a pass through the encoder.

        Args:
            pictures: the pictures, encoded or as uint8 pixels.
            names: the heads.
            render: called, in a thread of its own, with the (height, width) of each picture and
                what each head found on it, by name.
            timeline: gets the phases; None for no one.

        Raises:
            UnusablePictureError: some pictures cannot be used; it lists all of them.
            TooLargeError: a picture has too many windows.
            OverloadedError: too many pictures are waiting already.
            ModelFailureError: the model or a head failed.
        """
        self.admit(len(pictures))
        timeline = timeline or Timeline()
        heads = {name: self.heads[name] for name in names}
        self.waiting += len(pictures)
        try:
            with self._batcher.expecting(len(pictures)):
                prepared = await self._decoders.prepare(
                    pictures, lambda picture: self._prepare_views(picture, heads), timeline
                )
            turns = self._decoders.turns()
            jobs = (
                self._found(source, views, heads, render, timeline, turns)
                for source, views in prepared
            )
            return await asyncio.gather(*jobs)
        finally:
            self.waiting -= len(pictures)

    async def decode(
        self, pictures: Sequence[bytes], timeline: Timeline | None = None
    ) -> list[Image.Image]:
        """Decode pictures, in order, to as many channels as the model takes.

        Args:
            pictures: the encoded pictures.
            timeline: gets the phases; None for no one.

        Raises:
            UnusablePictureError: some cannot be used; it lists all of them.
        """

        def decoded(picture: Picture) -> tuple[Size, Image.Image]:
            assert isinstance(picture, bytes)
            image, source = self._preparer.decoded(picture)
            return source, image

        return await self._decoders.prepare(pictures, decoded, timeline or Timeline())

    async def alone(self, work: Callable[[], Result], timeline: Timeline) -> Result:
        """Run a function in the model's thread, after the batch that runs there.

        Args:
            work: the function.
            timeline: gets the phases.

        Raises:
            OverloadedError: too many pictures are waiting already.
        """
        self.admit(1)
        asked = time.perf_counter()

        def run() -> Result:
            started = time.perf_counter()
            timeline.add("queue", asked, started)
            try:
                return work()
            finally:
                timeline.add("model", started, time.perf_counter())

        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._model_thread, run)
        finally:
            self.waiting -= 1

    async def close(self) -> None:
        """Stop the batcher and the threads."""
        await self._batcher.close()
        self._decoders.close()
        for threads in (self._model_thread, self._lanes):
            threads.shutdown(wait=False, cancel_futures=True)
        self._preparer.process.close()

    def _patience_s(self) -> float:
        """Seconds to wait for pictures still being decoded: the time of one in the model."""
        return min(_MAX_PATIENCE_S, self._num_lanes * self._seconds_per_picture)

    def _prepare(self, picture: Picture, sizing: Sizing) -> tuple[Size, Prepared]:
        prepared = self._preparer.prepare(picture, sizing)
        return prepared.placement.source_size, prepared

    def _prepare_views(
        self, picture: Picture, heads: Mapping[str, Head]
    ) -> tuple[Size, tuple[Size, list[tuple[Prepared, tuple[str, ...]]]]]:
        """A picture's views, each with the heads that look at it; before and with them its size."""
        wanted: dict[Placement, list[str]] = {}

        def views_of(source: Size) -> list[Placement]:
            for name, head in heads.items():
                for view in head.views(source):
                    wanted.setdefault(view, []).append(name)
            return list(wanted)

        source, prepared = self._preparer.prepare_views(picture, views_of)
        return source, (source, [(item, tuple(wanted[item.placement])) for item in prepared])

    async def _found(
        self,
        source: Size,
        views: Sequence[tuple[Prepared, tuple[str, ...]]],
        heads: Mapping[str, Head],
        render: Callable[[Size, dict[str, Any]], Result],
        timeline: Timeline,
        turns: asyncio.Semaphore,
    ) -> Result:
        """Predictions of heads for one picture, rendered when the request has its turn."""
        now = time.perf_counter()
        made = await asyncio.gather(
            *(
                self._batcher.submit(
                    _Key(item.pixels.shape, item.pixels.dtype.str, Options(heads=names)),
                    _Waiting(item, now, timeline),
                )
                for item, names in views
            )
        )

        def finish() -> Result:
            parts: dict[str, list[Any]] = {name: [] for name in heads}
            for (_, names), prediction in zip(views, made, strict=True):
                for name in names:
                    parts[name].append(prediction.outputs[name])
            found = {name: head.finish(source, parts[name]) for name, head in heads.items()}
            return render(source, found)

        return await self._decoders.run(finish, turns)

    def _check_output(self, prepared: Sequence[Prepared], options: Options) -> None:
        size = sum(output_bytes(self.info, item.placement, options) for item in prepared)
        most = self._limits.answer_mib * MIB
        if size > most:
            raise TooLargeError(
                f"the answer would have {size} bytes, at most {most} are given",
                hint="ask for fewer layers or pictures, a smaller `size`, or dtype float16",
            )

    async def _run_batch(
        self, key: _Key, items: Sequence[_Waiting], lanes: int
    ) -> list[Prediction]:
        loop = asyncio.get_running_loop()
        threads = self._model_thread if lanes == self._num_lanes else self._lanes
        started = time.perf_counter()
        try:
            outputs = await loop.run_in_executor(
                threads, self._forward, [item.prepared for item in items], key.options
            )
        except EndpointError:
            raise
        except Exception as error:
            raise ModelFailureError(f"{type(error).__name__}: {error}") from error
        ended = time.perf_counter()
        for item in items:
            item.timeline.add("batch_wait", item.since, started)
            item.timeline.add("model", started, ended)
        per_picture = (ended - started) * lanes / self._num_lanes / len(items)
        self._seconds_per_picture += _SMOOTHING * (per_picture - self._seconds_per_picture)
        self._on_batch(len(items), len(items) * math.prod(key.shape[1:]))
        return [
            Prediction(
                {name: values[index] for name, values in outputs.items()}, item.prepared.placement
            )
            for index, item in enumerate(items)
        ]

    def _forward(
        self, items: Sequence[Prepared], options: Options
    ) -> dict[str, Array] | dict[str, list[Any]]:
        """Outputs by name, a row or an entry an item."""
        import torch

        from mimray.serving.inference.outputs import compute_outputs

        with torch.inference_mode():
            # uint8 to the device, a quarter of the bytes; normalised there.
            images = torch.from_numpy(np.stack([item.pixels for item in items])).to(self._device)
            if not images.is_floating_point():
                images = (images.float().div_(255) - self._mean) / self._std
            if options.heads:
                return self.heads.compute(images, options.heads)
            valid = None
            if any(item.placement.is_padded for item in items):
                stride = self.info.stride
                flags = np.stack([token_validity(item.placement, stride) for item in items])
                valid = torch.from_numpy(flags).to(self._device)
            outputs = compute_outputs(self._encoder, images, valid, options)
            return {name: _to_numpy(tensor) for name, tensor in outputs.items()}


def output_bytes(info: EncoderInfo, placement: Placement, options: Options) -> int:
    """Bytes of one picture's features, without the few of int8 scales."""
    height, width = placement.input_size
    pixels = height * width
    numbers = info.width if options.pooled else 0
    if options.tokens:
        numbers += info.width * pixels // info.stride**2
    numbers += sum(info.widths[i] * pixels // info.strides[i] ** 2 for i in options.layers)
    if options.pyramid is not None:
        widest = info.widths[options.pyramid]
        numbers += sum(widest * math.ceil(pixels / s**2) for s in options.levels)
    return numbers * _ITEM_SIZES[options.dtype]


def _to_numpy(tensor: Tensor) -> Array:
    import torch

    tensor = tensor.contiguous().cpu()
    if tensor.dtype == torch.bfloat16:  # which numpy does not have
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()
