"""From a protocol message to the predictor and back, for one model; no HTTP in here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from serving.errors import InvalidRequestError, ModelFailureError, TooLargeError
from serving.predictor import Array, Options, Picture, Prediction, Predictor
from serving.protocol import Body, InferRequest, NamedTensor, build_response

VERSION = "1"
PLATFORM = "mimray_pytorch"
DEFAULT_OUTPUTS = ("pooled", "tokens")
# What a client may know of a card: all that features depend on, nothing of the data or the plan.
PUBLIC_FACTS = {
    *("encoder", "image_size", "channels", "mean", "std", "interpolation", "pooling", "layers"),
    *("method", "weights_sha256"),
}
_LAYER = re.compile(r"layer_(0|[1-9][0-9]{0,3})")
_SIZE = re.compile(r"([0-9]{1,5}),([0-9]{1,5})")


class ModelHandler:
    """One model's side of the Open Inference Protocol.

    Input `image` is either `BYTES` [B], encoded pictures, or `UINT8` [B, H, W, C], pixels.
    Outputs: `pooled` [B, D], `tokens` [B, N, D], `layer_<i>` [B, D, h, w] (feature map after
    block i, counted from 0), `source_size` INT64 [B, 2] (height and width of each upright
    picture). Request parameters: `dtype` (`FP32` or `FP16`), `norm` (whether the final norm is
    applied to layers) and `size` (`rows,columns` of the model's input in pixels, multiples of its
    stride; what it was trained at by default). The answer's parameters `grid` (of the tokens) and
    `input_size` are `rows,columns`, too.

    Args:
        name: the model's name on this server.
        predictor: what computes.
        max_pictures: most pictures in one request.
    """

    def __init__(self, name: str, predictor: Predictor, *, max_pictures: int) -> None:
        self.name = name
        self._predictor = predictor
        self._max_pictures = max_pictures

    def metadata(self) -> dict[str, Any]:
        """The protocol's description of the model."""
        card, width = self._predictor.card, self._predictor.width
        # The grid follows from the size asked for, so it is left open.
        layers = [
            _tensor(f"layer_{i}", "FP32", [-1, channels, -1, -1])
            for i, channels in enumerate(self._predictor.layer_widths)
        ]
        return {
            "name": self.name,
            "versions": [VERSION],
            "platform": PLATFORM,
            "inputs": [_tensor("image", "BYTES", [-1])],
            "outputs": [
                _tensor("pooled", "FP32", [-1, width]),
                _tensor("tokens", "FP32", [-1, -1, width]),
                _tensor("source_size", "INT64", [-1, 2]),
                *layers,
            ],
            "parameters": {
                "max_pictures": self._max_pictures,
                "patch_size": self._predictor.stride,
                "strides": list(self._predictor.layer_strides),
                **card.model_dump(mode="json", include=PUBLIC_FACTS),
            },
        }

    async def infer(self, request: InferRequest) -> Body:
        """Answer one inference request."""
        pictures = self._pictures(request.inputs)
        names = tuple(output.name for output in request.outputs) or DEFAULT_OUTPUTS
        dtype = _dtype(request.parameters.get("dtype", "FP32"))
        options = self._options(names, request.parameters)
        predictions = await self._predictor.predict(pictures, options)
        try:
            return build_response(
                request,
                {name: _output(name, predictions, dtype) for name in names},
                model_name=self.name,
                model_version=VERSION,
                parameters={
                    "grid": _pair(predictions[0].grid),
                    "input_size": _pair(predictions[0].input_size),
                },
            )
        except ValueError as error:  # JSON has no words for NaN and infinity
            raise ModelFailureError("the features are not finite") from error

    def _pictures(self, inputs: Sequence[NamedTensor]) -> list[Picture]:
        if len(inputs) != 1 or inputs[0].name != "image":
            raise InvalidRequestError(
                f"inputs {[tensor.name for tensor in inputs]} were sent",
                hint="send exactly one, named `image`",
            )
        tensor = inputs[0]
        count = tensor.shape[0] if tensor.shape else 0
        if count == 0:
            raise InvalidRequestError("`image` holds no picture")
        if count > self._max_pictures:
            raise TooLargeError(
                f"{count} pictures in one request, at most {self._max_pictures} are taken",
                hint="send several requests",
            )
        if isinstance(tensor.data, list):
            return list(tensor.data)
        if tensor.datatype != "UINT8" or len(tensor.shape) != 4:
            raise InvalidRequestError(
                f"`image` came as {tensor.datatype} {list(tensor.shape)}",
                hint="send BYTES [B] (encoded pictures) or UINT8 [B, H, W, C] (pixels)",
            )
        return list(tensor.data)

    def _options(self, names: Sequence[str], parameters: Mapping[str, object]) -> Options:
        norm = parameters.get("norm", True)
        if not isinstance(norm, bool):
            raise InvalidRequestError("parameter `norm` must be true or false")
        if len(set(names)) != len(names):
            raise InvalidRequestError("an output is asked for twice")
        layers = []
        for name in names:
            found = _LAYER.fullmatch(name)
            if found and int(found[1]) < self._predictor.depth:
                layers.append(int(found[1]))
            elif name not in (*DEFAULT_OUTPUTS, "source_size"):
                raise InvalidRequestError(
                    f"there is no output {name!r}",
                    hint="there are pooled, tokens, source_size and "
                    f"layer_0 to layer_{self._predictor.depth - 1}",
                )
        return Options(
            tokens="tokens" in names,
            layers=tuple(sorted(layers)),
            norm=norm,
            size=self._size(parameters.get("size")),
        )

    def _size(self, wanted: object) -> tuple[int, int] | None:
        if wanted is None:
            return None
        found = _SIZE.fullmatch(str(wanted))
        stride, most = self._predictor.stride, self._predictor.limits.max_input_pixels
        if not found:
            raise InvalidRequestError(
                f"parameter `size` is {wanted!r}", hint='use "rows,columns" in pixels'
            )
        height, width = int(found[1]), int(found[2])
        if height % stride or width % stride or not height or not width:
            raise InvalidRequestError(
                f"an input of {height} x {width} pixels (height x width) is not a multiple of "
                f"the model's stride {stride}"
            )
        if height * width > most:
            raise TooLargeError(
                f"an input of {height} x {width} pixels is more than the allowed {most}"
            )
        return height, width


def _pair(sides: tuple[int, int]) -> str:
    return f"{sides[0]},{sides[1]}"


def _tensor(name: str, datatype: str, shape: list[int]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape}


def _dtype(value: object) -> type[np.floating[Any]]:
    kinds: dict[object, type[np.floating[Any]]] = {"FP32": np.float32, "FP16": np.float16}
    if value not in kinds:
        raise InvalidRequestError(f"parameter `dtype` is {value!r}", hint="use FP32 or FP16")
    return kinds[value]


def _output(name: str, predictions: Sequence[Prediction], dtype: type[np.floating[Any]]) -> Array:
    if name == "source_size":
        return np.array([p.source_size for p in predictions], np.int64)
    if name == "pooled":
        parts = [p.pooled for p in predictions]
    elif name == "tokens":
        parts = [p.tokens for p in predictions if p.tokens is not None]
    else:
        layer = int(name.removeprefix("layer_"))
        parts = [p.layers[layer] for p in predictions]
    return np.stack(parts).astype(dtype, copy=False)
