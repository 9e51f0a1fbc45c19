"""From a protocol message to the predictor and back, for one model; no HTTP in here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from serving.errors import InvalidRequestError, ModelFailureError, TooLargeError
from serving.predictor import Array, Options, Picture, Prediction, Predictor
from serving.protocol import Body, InferRequest, NamedTensor, build_response

VERSION = "1"
PLATFORM = "mimray_pytorch"
DEFAULT_OUTPUTS = ("pooled", "tokens")
_LAYER = re.compile(r"layer_(0|[1-9][0-9]{0,3})")


class ModelHandler:
    """One model's side of the Open Inference Protocol.

    Input `image` is either `BYTES` [B], encoded pictures, or `UINT8` [B, H, W, C], pixels.
    Outputs: `pooled` [B, D], `tokens` [B, N, D], `layer_<i>` [B, D, h, w] (feature map after
    block i, counted from 0), `source_size` INT64 [B, 2] (height and width of each upright
    picture). Request parameters: `dtype` (`FP32` or `FP16`) and `norm` (whether the final norm
    is applied to layers). The answer's parameters `grid` (of the tokens) and
    `input_size` (of the model, pixels) are `rows,columns`.

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
        height_px, width_px = card.image_size
        stride_px = self._predictor.stride
        num_tokens = (height_px // stride_px) * (width_px // stride_px)
        sizes = zip(self._predictor.layer_widths, self._predictor.layer_strides, strict=True)
        layers = [
            _tensor(f"layer_{i}", "FP32", [-1, channels, height_px // px, width_px // px])
            for i, (channels, px) in enumerate(sizes)
        ]
        return {
            "name": self.name,
            "versions": [VERSION],
            "platform": PLATFORM,
            "inputs": [_tensor("image", "BYTES", [-1])],
            "outputs": [
                _tensor("pooled", "FP32", [-1, width]),
                _tensor("tokens", "FP32", [-1, num_tokens, width]),
                _tensor("source_size", "INT64", [-1, 2]),
                *layers,
            ],
            "parameters": {
                "max_pictures": self._max_pictures,
                "image_size": [height_px, width_px],
                "patch_size": stride_px,
                "layers": list(card.layers),
                **card.model_dump(
                    mode="json",
                    include={"mean", "std", "interpolation", "method", "weights_sha256"},
                ),
            },
        }

    async def infer(self, request: InferRequest) -> Body:
        """Answer one inference request."""
        pictures = self._pictures(request.inputs)
        names = tuple(output.name for output in request.outputs) or DEFAULT_OUTPUTS
        dtype = _dtype(request.parameters.get("dtype", "FP32"))
        options = self._options(names, request.parameters.get("norm", True))
        predictions = await self._predictor.predict(pictures, options)
        try:
            return build_response(
                request,
                {name: _output(name, predictions, dtype) for name in names},
                model_name=self.name,
                model_version=VERSION,
                parameters={
                    "grid": _pair(predictions[0].grid),
                    "input_size": _pair(self._predictor.card.image_size),
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

    def _options(self, names: Sequence[str], norm: object) -> Options:
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
        return Options(tokens="tokens" in names, layers=tuple(sorted(layers)), norm=norm)


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
