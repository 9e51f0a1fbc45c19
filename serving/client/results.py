"""Answers of an endpoint as values: arrays, and their description."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mimray.serving.wire import bodies
from mimray.serving.wire.bodies import Pair
from mimray.serving.wire.codecs import Array, Tensor, widen_bfloat16
from mimray.serving.wire.errors import ModelFailureError
from mimray.serving.wire.oip_messages import InferResponse


@dataclass(frozen=True)
class Features:
    """Features of one picture, and how they lie over it.

    Coordinates are continuous pixels (x, y): the left edge of the first column is x = 0.

    Attributes:
        pooled: [D].
        tokens: [N, D], row-major over the grid.
        layers: [D, h, w] by layer, counted from 0.
        pyramid: [D, h, w] by stride, pixels of the input; derived without parameters.
        grid: (h, w) of the tokens.
        stride: (vertical, horizontal) pixels of the model's input a token covers.
        source_size: (height, width) of the upright picture, pixels.
        input_size: (height, width) of the model's input, pixels.
        transform: float64 [3, 3], from (x, y, 1) in the picture to the model's input.
        inverse: float64 [3, 3], the way back.
        valid_region: (left, top, right, bottom) of the model's input that shows the picture.
        model: its name.
        version: the model's.
        weights_sha256: hash of the weights.
        metadata: all that the endpoint says: mean, std, dtype, outputs, ….
    """

    pooled: Array
    tokens: Array
    layers: dict[int, Array]
    pyramid: dict[int, Array]
    grid: Pair
    stride: tuple[float, float]
    source_size: Pair
    input_size: Pair
    transform: Array
    inverse: Array
    valid_region: tuple[float, float, float, float]
    model: str
    version: str
    weights_sha256: str
    metadata: dict[str, Any]

    def __repr__(self) -> str:
        height, width = self.source_size
        maps = [f"layers[{layer}] {list(array.shape)}" for layer, array in self.layers.items()]
        maps += [f"pyramid[{stride}] {list(array.shape)}" for stride, array in self.pyramid.items()]
        arrays = [f"pooled {list(self.pooled.shape)}", f"tokens {list(self.tokens.shape)}", *maps]
        of = f"{self.model} version {self.version}"
        return f"<Features of {width} x {height} pixels by {of}: {', '.join(arrays)}>"

    def to_source(self, x: float, y: float) -> tuple[float, float]:
        """Map a point of the model's input to the picture."""
        return _mapped(self.inverse, x, y)

    def to_input(self, x: float, y: float) -> tuple[float, float]:
        """Map a point of the picture to the model's input."""
        return _mapped(self.transform, x, y)

    def at(self, x: float, y: float) -> Array:
        """The token [D] over a point of the picture.

        Raises:
            IndexError: the point lies outside.
        """
        height, width = self.source_size
        if not (0 <= x <= width and 0 <= y <= height):
            raise IndexError(f"({x}, {y}) lies outside of {width} x {height} pixels")
        across, down = self.to_input(x, y)
        row = min(int(down / self.stride[0]), self.grid[0] - 1)
        column = min(int(across / self.stride[1]), self.grid[1] - 1)
        token: Array = self.tokens[row * self.grid[1] + column]
        return token


@dataclass(frozen=True)
class Reconstruction:
    """A model's prediction of a picture of which it saw a part.

    Attributes:
        grid: (h, w) of the mask.
        mask: bool [h, w], True = hidden; None of models that hide nothing.
        mask_ratio: the part that was hidden.
        masked: PNG of what the model saw; None of models that hide nothing.
        reconstruction: PNG of what it predicts, what it saw pasted in.
        raw: PNG of the prediction alone.
        panels: every picture that explains the prediction, as PNG, by title.
    """

    grid: Pair
    mask: Array | None
    mask_ratio: float | None
    masked: bytes | None
    reconstruction: bytes | None
    raw: bytes | None
    panels: dict[str, bytes]

    def __repr__(self) -> str:
        rows, columns = self.grid
        hidden = "nothing" if self.mask_ratio is None else f"{self.mask_ratio:.0%}"
        titles = ", ".join(self.panels)
        return f"<Reconstruction, {hidden} of {rows} x {columns} patches hidden: {titles}>"


class _Metadata(bodies.Body):
    model: str
    version: str
    weights_sha256: str
    pictures: list[bodies.Geometry]


def read_outputs(response: InferResponse) -> dict[str, Array]:
    """Arrays [B, …] by name, as numpy counts: bfloat16 and int8 widened to float32."""
    tensors = response.outputs
    return {
        name: _widened(name, tensor, tensors)
        for name, tensor in tensors.items()
        if not name.endswith("_scale")
    }


def read_features(response: InferResponse) -> Features:
    """Features of the one picture that was asked for.

    Raises:
        ModelFailureError: the answer lacks what belongs to features.
    """
    outputs = read_outputs(response)
    try:
        metadata: dict[str, Any] = json.loads(str(response.parameters["metadata"]))
        described = _Metadata.model_validate(metadata)
        (geometry,) = described.pictures
        arrays = {name: only for name, (only,) in outputs.items()}
        return Features(
            pooled=arrays["pooled"],
            tokens=arrays["tokens"],
            layers=_numbered(arrays, "layer_"),
            pyramid=_numbered(arrays, "pyramid_"),
            grid=geometry.grid,
            stride=(float(geometry.stride[0]), float(geometry.stride[1])),
            source_size=geometry.source_size,
            input_size=geometry.input_size,
            transform=np.array(geometry.transform),
            inverse=np.array(geometry.inverse),
            valid_region=geometry.valid_region,
            model=described.model,
            version=described.version,
            weights_sha256=described.weights_sha256,
            metadata=metadata,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFailureError(f"the answer does not describe features: {error}") from error


def read_reconstruction(tree: Any) -> Reconstruction:
    """A reconstruction from its JSON.

    Raises:
        ModelFailureError: it is none.
    """
    try:
        body = bodies.Reconstruction.model_validate(tree)
        return Reconstruction(
            grid=body.grid,
            mask=None if body.mask is None else np.array(body.mask, bool).reshape(body.grid),
            mask_ratio=body.mask_ratio,
            masked=_picture(body.masked),
            reconstruction=_picture(body.reconstruction),
            raw=_picture(body.raw),
            panels={panel.title: _picture(panel.image) or b"" for panel in body.panels},
        )
    except ValueError as error:
        raise ModelFailureError(f"the answer is no reconstruction: {error}") from error


def _picture(uri: str | None) -> bytes | None:
    """The content of a data URI."""
    return None if uri is None else base64.b64decode(uri.partition(",")[2], validate=True)


def _widened(name: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> Array:
    if not isinstance(tensor, np.ndarray):
        raise ModelFailureError(f"output {name!r} holds no numbers")
    if tensor.dtype == np.uint16:
        return widen_bfloat16(tensor)
    if tensor.dtype != np.int8:
        return np.require(tensor, requirements="A")
    scale = tensors.get(f"{name}_scale")
    if not isinstance(scale, np.ndarray):
        raise ModelFailureError(f"output {name!r} came as int8 without its scale")
    return np.multiply(tensor, scale, dtype=np.float32)


def _numbered(arrays: Mapping[str, Array], prefix: str) -> dict[int, Array]:
    return {
        int(name.removeprefix(prefix)): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }


def _mapped(matrix: Array, x: float, y: float) -> tuple[float, float]:
    across, down, scale = (float(value) for value in matrix @ (x, y, 1.0))
    return across / scale, down / scale
