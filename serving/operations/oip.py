"""The Open Inference Protocol v2 for one model: its descriptions, and inference.

Input `image` is `BYTES` [B], encoded pictures; `UINT8` [B, H, W, C], pixels; or `FP32`/`FP16`
[B, C, H, W], normalised by the model's own mean and std. Outputs: those of
`inference.options.Options`, and of each picture `source_size` INT64 [B, 2] (height, width),
`transform` FP64 [B, 3, 3] (from the picture to the model's input) and `valid_region` FP64 [B, 4].
`head_NAME` `BYTES` [B] is what a trained head found on each picture, the JSON of `/v1/predict`.
The answer's parameters: `grid` (of the tokens) and `input_size`, both `rows,columns`, and
`metadata`, JSON.

Source: kserve/open-inference-protocol; Triton's extensions for binary tensors, model
configuration and statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mimray.serving.inference.options import NAMES, PYRAMID_STRIDES, Options, parse_options
from mimray.serving.inference.predictor import Prediction
from mimray.serving.inference.preprocess import Array, Picture
from mimray.serving.inference.timeline import Timeline
from mimray.serving.operations.calls import Call, Reply
from mimray.serving.operations.metadata import answer_metadata, public
from mimray.serving.operations.operation import MODEL_PATH, Computation, Description, Model
from mimray.serving.operations.predict import find, parse_wanted
from mimray.serving.operations.response_formats import dumps, stacked
from mimray.serving.wire.bodies import Parameters
from mimray.serving.wire.codecs import Tensor
from mimray.serving.wire.errors import InvalidRequestError, ModelFailureError, TooLargeError
from mimray.serving.wire.oip_messages import (
    HEADER_LENGTH,
    InferRequest,
    NamedTensor,
    RequestedOutput,
    build_response,
    parse_request,
)

PLATFORM = "mimray_pytorch"
_GEOMETRY = ("source_size", "transform", "valid_region")
_DEFAULT = ("pooled", "tokens")
_HEAD_PREFIX = "head_"
_HEAD_PARAMETERS = ("masks", "min_score", "top")
# Parameters that the protocol and its clients have for other purposes; without meaning here.
_FOREIGN = frozenset(
    ("binary_data_output", "priority", "timeout", "sequence_id", "sequence_start", "sequence_end")
)


def _metadata(model: Model) -> dict[str, Any]:
    info = model.info
    # The grid follows from the size asked for, so it is left open.
    outputs = [
        _tensor("pooled", "FP32", [-1, info.width]),
        _tensor("tokens", "FP32", [-1, -1, info.width]),
        _tensor("source_size", "INT64", [-1, 2]),
        _tensor("transform", "FP64", [-1, 3, 3]),
        _tensor("valid_region", "FP64", [-1, 4]),
        *(_tensor(f"layer_{i}", "FP32", [-1, w, -1, -1]) for i, w in enumerate(info.widths)),
        *(_tensor(f"pyramid_{s}", "FP32", [-1, -1, -1, -1]) for s in PYRAMID_STRIDES),
        *(_tensor(f"{_HEAD_PREFIX}{name}", "BYTES", [-1]) for name in model.predictor.heads),
    ]
    return {
        "name": model.name,
        "versions": list(model.versions),
        "platform": PLATFORM,
        "inputs": [_tensor("image", "BYTES", [-1])],
        "outputs": outputs,
        "parameters": public(model),
    }


def _ready(model: Model) -> dict[str, Any]:
    return {"name": model.name, "ready": True}


def _statistics(model: Model) -> dict[str, Any]:
    """Triton's statistics, as far as they mean something here."""
    success = {"count": model.pictures, "ns": int(model.busy_s * 1e9)}
    return {
        "model_stats": [
            {
                "name": model.name,
                "version": model.version,
                "inference_count": model.pictures,
                "inference_stats": {"success": success},
            }
        ]
    }


def _config(model: Model) -> dict[str, Any]:
    """Triton's model configuration, as far as its tools read it."""
    metadata = _metadata(model)
    types = {"BYTES": "TYPE_STRING"}

    def described(tensors: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {
                "name": tensor["name"],
                "data_type": types.get(tensor["datatype"], f"TYPE_{tensor['datatype']}"),
                "dims": tensor["shape"],
            }
            for tensor in tensors
        ]

    return {
        "name": model.name,
        "platform": PLATFORM,
        "backend": PLATFORM,
        # 0: the first dimension of every tensor is the batch, written out.
        "max_batch_size": 0,
        "input": described(metadata["inputs"]),
        "output": described(metadata["outputs"]),
        "version_policy": {"latest": {"num_versions": 1}},
    }


async def _infer(model: Model, call: Call, timeline: Timeline) -> tuple[Reply, int]:
    request = parse_request(call.body, call.headers.get(HEADER_LENGTH.lower()))
    pictures = _pictures(request.inputs, model.limits.pictures)
    known = (*NAMES, *_HEAD_PARAMETERS)
    unknown = request.parameters.keys() - {*known, *_FOREIGN}
    if unknown:
        raise InvalidRequestError(
            f"there is no parameter {sorted(unknown)[0][:40]!r}", hint=f"there are {list(known)}"
        )
    named = [output.name for output in request.outputs]
    if len(set(named)) != len(named):
        raise InvalidRequestError("an output is asked for twice")
    heads = [name for name in named if name.startswith(_HEAD_PREFIX)]
    tensors: dict[str, Tensor] = {}
    parameters: Parameters = {}
    if heads:
        tensors |= await _found(model, pictures, heads, request.parameters, timeline)
    if len(heads) < len(named) or not named:
        rest = [name for name in named if name not in heads]
        features, parameters = await _features(model, pictures, rest, request.parameters, timeline)
        tensors |= features
    try:
        body = build_response(
            _with_scales(request, {name: tensors[name] for name in _ordered(named, tensors)}),
            tensors,
            model_name=model.name,
            model_version=model.version,
            parameters=parameters,
        )
    except ValueError as error:  # JSON has no words for NaN and infinity
        raise ModelFailureError("the features are not finite") from error
    return Reply(200, body.headers, body.content), len(pictures)


async def _features(
    model: Model,
    pictures: Sequence[Picture],
    named: Sequence[str],
    asked: Parameters,
    timeline: Timeline,
) -> tuple[dict[str, Array], Parameters]:
    """Features by name, the default ones where none is named, and the answer's parameters."""
    options = parse_options(
        asked,
        model.info,
        outputs=[name for name in named if name not in _GEOMETRY],
        default=() if named else _DEFAULT,
    )
    predictions = await model.predictor.predict(pictures, options, timeline)
    metadata = answer_metadata(model, options, predictions)
    parameters: Parameters = {"metadata": dumps(metadata)}
    if len({p.placement.input_size for p in predictions}) == 1:
        first = metadata["pictures"][0]
        parameters["grid"] = ",".join(map(str, first["grid"]))
        parameters["input_size"] = ",".join(map(str, first["input_size"]))
    return _tensors(tuple(named) or options.names, predictions, options), parameters


async def _found(
    model: Model,
    pictures: Sequence[Picture],
    named: Sequence[str],
    asked: Parameters,
    timeline: Timeline,
) -> dict[str, Tensor]:
    """Predictions of heads by output name: a JSON text a picture, as of `/v1/predict`."""
    names = [name.removeprefix(_HEAD_PREFIX) for name in named]
    told = {name: asked.get(name) for name in _HEAD_PARAMETERS}
    wanted = parse_wanted(model, {**told, "heads": ",".join(names)})
    trees = await find(model, pictures, wanted, timeline)
    return {
        f"{_HEAD_PREFIX}{name}": [
            dumps({"source_size": tree["source_size"], **tree["heads"][name]}).encode()
            for tree in trees
        ]
        for name in names
    }


def _ordered(named: Sequence[str], tensors: Mapping[str, Tensor]) -> list[str]:
    """The tensors in the order in which they were asked for, scales behind what they belong to."""
    if not named:
        return list(tensors)
    return [output for name in named for output in (name, f"{name}_scale") if output in tensors]


METADATA = Description(
    name="metadata",
    path=MODEL_PATH,
    summary="The protocol's description of a model",
    describe=_metadata,
)
READY = Description(
    name="ready", path=f"{MODEL_PATH}/ready", summary="Whether it answers", describe=_ready
)
CONFIG = Description(
    name="config",
    path=f"{MODEL_PATH}/config",
    summary="Triton's model configuration",
    describe=_config,
)
STATS = Description(
    name="stats", path=f"{MODEL_PATH}/stats", summary="Triton's statistics", describe=_statistics
)
INFER = Computation(
    name="infer",
    path=f"{MODEL_PATH}/infer",
    summary="Inference (Open Inference Protocol v2, binary tensor extension)",
    compute=_infer,
)


def _pictures(inputs: Sequence[NamedTensor], max_pictures: int) -> list[Picture]:
    if len(inputs) != 1 or inputs[0].name != "image":
        raise InvalidRequestError(
            f"inputs {[tensor.name[:40] for tensor in inputs[:5]]} were sent",
            hint="send exactly one, named `image`",
        )
    tensor = inputs[0]
    count = tensor.shape[0] if tensor.shape else 0
    if count == 0:
        raise InvalidRequestError("`image` holds no picture")
    if count > max_pictures:
        raise TooLargeError(
            f"{count} pictures in one request, at most {max_pictures} are taken",
            hint="send several requests",
        )
    if isinstance(tensor.data, list):
        return list(tensor.data)
    if tensor.datatype not in ("UINT8", "FP32", "FP16") or len(tensor.shape) != 4:
        raise InvalidRequestError(
            f"`image` came as {tensor.datatype} {list(tensor.shape)}",
            hint="send BYTES [B] (encoded pictures), UINT8 [B, H, W, C] (pixels) or FP32 "
            "[B, C, H, W] (normalised)",
        )
    if tensor.datatype == "UINT8":
        return list(tensor.data)
    return list(tensor.data.astype(np.float32, copy=False))


def _tensors(
    names: Sequence[str], predictions: Sequence[Prediction], options: Options
) -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    for name in names:
        if name in _GEOMETRY:
            tensors[name] = _geometry(name, predictions)
            continue
        for output in (name, f"{name}_scale") if options.dtype == "int8" else (name,):
            parts = [prediction.outputs[output] for prediction in predictions]
            if len({part.shape for part in parts}) > 1:
                raise InvalidRequestError(
                    f"pictures of different sizes have {name} of different shapes",
                    hint="send one a request, or use `size` keep or a fixed one",
                )
            tensors[output] = stacked(parts)
    return tensors


def _geometry(name: str, predictions: Sequence[Prediction]) -> Array:
    placements = [prediction.placement for prediction in predictions]
    if name == "source_size":
        return np.array([p.source_size for p in placements], np.int64)
    if name == "transform":
        return np.array([p.transform for p in placements], np.float64)
    return np.array([p.valid_region for p in placements], np.float64)


def _with_scales(request: InferRequest, tensors: Mapping[str, Tensor]) -> InferRequest:
    """The request with the scales of int8 outputs among those it names."""
    if not request.outputs:
        return request
    binary = {output.name: output.binary for output in request.outputs}
    wanted = tuple(
        RequestedOutput(name, binary[name if name in binary else name.removesuffix("_scale")])
        for name in tensors
    )
    return InferRequest(
        request.inputs, wanted, request.binary_output, request.parameters, request.id
    )


def _tensor(name: str, datatype: str, shape: list[int]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape}
