"""Pictures in, features out, with no protocol around it.

Decoding runs in threads beside the model; prepared pictures are grouped by shape and options;
a picture that cannot be used fails alone, whatever it was batched with.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from serving.batcher import Batcher
from serving.errors import ModelFailureError, UnusablePictureError
from trainers.errors import ImageError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from trainers.bundles import BundleCard

Array = np.ndarray[Any, Any]
Picture = bytes | Array
"""An encoded picture, or uint8 [H, W, C] pixels."""


@dataclass(frozen=True)
class Options:
    """What to compute; part of the batching key, so equal only when results may be shared.

    Attributes:
        tokens: whether the patch tokens are wanted beside the pooled vector.
        layers: layers whose feature maps are wanted.
        norm: whether the final norm is applied to those maps.
        size: (height, width) of the model's input in pixels; the card's by default.
    """

    tokens: bool = True
    layers: tuple[int, ...] = ()
    norm: bool = True
    size: tuple[int, int] | None = None


class Prediction(NamedTuple):
    """Features of one picture.

    Attributes:
        pooled: float32 [D].
        tokens: float32 [N, D]; None when not asked for.
        layers: float32 [D, h, w] by layer.
        grid: (h, w) of the tokens.
        source_size: (height, width) of the upright picture, in pixels.
        input_size: (height, width) of the model's input, in pixels.
    """

    pooled: Array
    tokens: Array | None
    layers: dict[int, Array]
    grid: tuple[int, int]
    source_size: tuple[int, int]
    input_size: tuple[int, int]


class _Key(NamedTuple):
    shape: tuple[int, ...]
    options: Options


class _Prepared(NamedTuple):
    pixels: Array  # uint8 [C, H, W] at the model's input size
    source_size: tuple[int, int]


@dataclass(frozen=True)
class PredictorLimits:
    """How much is taken in and how it is grouped.

    Attributes:
        max_batch_size: most pictures in one pass through the model.
        batch_wait_s: longest wait for company while the model is free.
        max_queue_size: most pictures waiting for the model.
        max_pixels: most pixels of one picture, checked from its header.
        max_input_pixels: most pixels of the model's input, where a request says its size.
    """

    max_batch_size: int = 16
    batch_wait_s: float = 0.005
    max_queue_size: int = 256
    max_pixels: int = 50_000_000
    max_input_pixels: int = 1536 * 1536


class Predictor:
    """A frozen encoder that takes pictures one request at a time and runs them in batches.

    Args:
        bundle: directory of the bundle.
        device: `cpu`, `cuda`, or `auto` for the best there is.
        num_threads: threads the model may use on a CPU; Ray sets OMP_NUM_THREADS to 1, so
            this is said explicitly.
        limits: how much is taken in and how it is grouped.
    """

    def __init__(
        self,
        bundle: Path,
        *,
        device: str = "auto",
        num_threads: int = 1,
        limits: PredictorLimits | None = None,
    ) -> None:
        import torch

        from trainers.bundles import load_bundle

        torch.set_num_threads(num_threads)
        self.limits = limits or PredictorLimits()
        self._device = torch.device(_pick_device() if device == "auto" else device)
        self._encoder = load_bundle(bundle).to(self._device)
        self.card: BundleCard = self._encoder.card
        self.depth: int = self._encoder.encoder.depth
        self.width: int = self._encoder.encoder.width
        self.stride: int = self._encoder.encoder.stride
        self.layer_widths: tuple[int, ...] = self._encoder.encoder.widths
        self.layer_strides: tuple[int, ...] = self._encoder.encoder.strides
        self._mean, self._std = (
            torch.tensor(values, device=self._device).view(1, -1, 1, 1)
            for values in (self.card.mean, self.card.std)
        )
        self._decoders = ThreadPoolExecutor(max(2, num_threads), thread_name_prefix="decode")
        self._model_thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._batcher: Batcher[_Key, _Prepared, Prediction] = Batcher(
            self._run_batch,
            max_batch_size=self.limits.max_batch_size,
            batch_wait_s=self.limits.batch_wait_s,
            max_queue_size=self.limits.max_queue_size,
        )

    def warm_up(self) -> None:
        """Run the model once, so that the first request does not pay for it."""
        height, width = self.card.image_size
        blank = np.zeros((self.card.channels, height, width), np.uint8)
        self._forward([blank], Options(layers=(self.depth - 1,)))

    async def predict(self, pictures: Sequence[Picture], options: Options) -> list[Prediction]:
        """Features of every picture, in order.

        Raises:
            UnusablePictureError: some pictures cannot be used; it lists all of them.
            OverloadedError: too many pictures are waiting already.
            ModelFailureError: the model failed.
        """
        self._batcher.reserve(len(pictures))
        loop = asyncio.get_running_loop()
        size = options.size or self.card.image_size
        prepared = await asyncio.gather(
            *(loop.run_in_executor(self._decoders, self._prepare, p, size) for p in pictures),
            return_exceptions=True,
        )
        _refuse_unusable(prepared)
        return await asyncio.gather(
            *(
                self._batcher.submit(_Key(item.pixels.shape, options), item)
                for item in prepared
                if not isinstance(item, BaseException)
            )
        )

    async def close(self) -> None:
        """Stop the batcher and the threads."""
        await self._batcher.close()
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self._model_thread.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, picture: Picture, size: tuple[int, int]) -> _Prepared:
        """Decode and resize one picture to the model's input, (height, width) pixels.

        Raises:
            ImageError: the picture cannot be used.
        """
        from trainers.data.decode import decode_rgb
        from trainers.data.transforms import inference_view

        card = self.card
        if isinstance(picture, bytes):
            image = decode_rgb(picture, max_pixels=self.limits.max_pixels)
            if card.channels == 1:
                image = image.convert("L")
            elif card.channels != 3:
                raise ImageError(
                    "wrong_channels",
                    f"encoded pictures give 3 channels, the model takes {card.channels}",
                    hint="send UINT8 pixels",
                )
        else:
            _check_pixels(picture, card.channels, self.limits.max_pixels)
            if picture.shape[:2] == size:
                return _Prepared(picture.transpose(2, 0, 1), size)
            image = _image_from_pixels(picture, size)
        pixels = inference_view(image, size, card.interpolation)
        return _Prepared(pixels, (image.height, image.width))

    async def _run_batch(self, key: _Key, items: Sequence[_Prepared]) -> list[Prediction]:
        loop = asyncio.get_running_loop()
        pixels = [item.pixels for item in items]
        try:
            return await loop.run_in_executor(
                self._model_thread, self._finish, pixels, items, key.options
            )
        except Exception as error:
            raise ModelFailureError(f"{type(error).__name__}: {error}") from error

    def _finish(
        self, pixels: Sequence[Array], items: Sequence[_Prepared], options: Options
    ) -> list[Prediction]:
        pooled, tokens, layers, grid = self._forward(pixels, options)
        return [
            Prediction(
                pooled[index],
                None if tokens is None else tokens[index],
                {layer: maps[index] for layer, maps in layers.items()},
                grid,
                item.source_size,
                (item.pixels.shape[1], item.pixels.shape[2]),
            )
            for index, item in enumerate(items)
        ]

    def _forward(
        self, pixels: Sequence[Array], options: Options
    ) -> tuple[Array, Array | None, dict[int, Array], tuple[int, int]]:
        import torch

        with torch.inference_mode():
            # uint8 to the device, a quarter of the bytes; normalised there.
            batch = torch.from_numpy(np.stack(pixels)).to(self._device)
            images = (batch.float().div(255) - self._mean) / self._std
            features = self._encoder(images)
            maps = (
                self._encoder.features(images, layers=options.layers, norm=options.norm)
                if options.layers
                else ()
            )
            return (
                _to_numpy(features.pooled),
                _to_numpy(features.tokens) if options.tokens else None,
                {layer: _to_numpy(m) for layer, m in zip(options.layers, maps, strict=True)},
                features.grid,
            )


def _pick_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _to_numpy(tensor: Tensor) -> Array:
    return tensor.float().cpu().numpy()


def _check_pixels(pixels: Array, channels: int, max_pixels: int) -> None:
    height, width, found = pixels.shape
    if found != channels:
        raise ImageError("wrong_channels", f"{found} channels, the model takes {channels}")
    if min(height, width) < 2:
        raise ImageError("too_small", f"{width} x {height} pixels; each side needs at least 2")
    if height * width > max_pixels:
        raise ImageError(
            "too_large", f"{width} x {height} pixels are more than the allowed {max_pixels}"
        )


def _image_from_pixels(pixels: Array, input_size: tuple[int, int]) -> Image.Image:
    from PIL import Image

    channels = pixels.shape[2]
    if channels not in (1, 3):
        raise ImageError(
            "wrong_size",
            f"pictures of {channels} channels are not resized here",
            hint=f"send them at {input_size[0]} x {input_size[1]} (height x width)",
        )
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def _refuse_unusable(prepared: Sequence[_Prepared | BaseException]) -> None:
    """Raise for what could not be prepared, saying which pictures and why."""
    unusable = []
    for index, outcome in enumerate(prepared):
        if isinstance(outcome, ImageError):
            unusable.append({"index": index, "reason": outcome.reason, "message": str(outcome)})
        elif isinstance(outcome, BaseException):
            raise outcome
    if unusable:
        first = unusable[0]
        more = f" (and {len(unusable) - 1} more)" if len(unusable) > 1 else ""
        raise UnusablePictureError(
            f"picture {first['index']} cannot be used: {first['message']}{more}",
            details={"pictures": unusable},
        )
