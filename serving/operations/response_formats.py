"""Features as files, in the format that `Accept` prefers: JSON, npy, npz, Arrow, safetensors."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mimray.serving.inference.predictor import Prediction
from mimray.serving.inference.preprocess import Array
from mimray.serving.operations.calls import Headers
from mimray.serving.wire.errors import ModelFailureError, NotAcceptableError

METADATA_HEADER = "X-Mimray-Metadata"
# Servers and proxies take some 16 KiB of headers in all.
_MAX_METADATA_HEADER = 8192
_SAFETENSORS_DTYPES = {"f2": "F16", "f4": "F32", "i1": "I8", "u2": "BF16"}


@dataclass(frozen=True)
class Answer:
    """Features of the pictures of one request.

    Attributes:
        names: names of the outputs, scales of int8 included.
        predictions: the prediction of every picture, in order.
        metadata: the answer's metadata.
    """

    names: tuple[str, ...]
    predictions: Sequence[Prediction]
    metadata: dict[str, Any]

    def arrays(self) -> dict[str, Array]:
        """Arrays [B, …] by name; for pictures of different shapes one each, `<name>.<index>`."""
        found: dict[str, Array] = {}
        for name in self.names:
            parts = [prediction.outputs[name] for prediction in self.predictions]
            if len({part.shape for part in parts}) == 1:
                found[name] = stacked(parts)
            else:
                found |= {f"{name}.{index}": part for index, part in enumerate(parts)}
        return found

    @property
    def is_bfloat16(self) -> bool:
        """True if the arrays hold bits of bfloat16, which numpy does not have."""
        return bool(self.metadata["dtype"] == "bfloat16")


def stacked(parts: Sequence[Array]) -> Array:
    """Stack arrays of equal shapes to [B, …]; of one, a view."""
    return parts[0][None] if len(parts) == 1 else np.stack(parts)


def dumps(tree: Any) -> str:
    """Write compact JSON.

    Raises:
        ModelFailureError: NaN or infinity, for which JSON has no words.
    """
    try:
        return json.dumps(tree, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise ModelFailureError("the features are not finite") from error


def write_json(answer: Answer) -> tuple[bytes, Headers]:
    """Write JSON: pooled vectors and geometry.

    Raises:
        NotAcceptableError: other outputs were asked for.
    """
    wrong = [name for name in answer.names if name not in ("pooled", "pooled_scale")]
    if wrong or answer.is_bfloat16:
        raise NotAcceptableError(
            f"{', '.join(wrong) or 'bfloat16'} does not go into JSON here",
            hint=f"send `Accept: {SAFETENSORS}` or {NPZ}",
        )
    metadata = dict(answer.metadata)
    pictures = metadata.pop("pictures")
    rows = []
    for index, prediction in enumerate(answer.predictions):
        values = {name: prediction.outputs[name] for name in answer.names}
        vectors = {name: array.astype(np.float64).tolist() for name, array in values.items()}
        rows.append({"index": index, **vectors, **pictures[index]})
    tree = {
        "model": metadata["model"],
        "version": metadata["version"],
        "metadata": metadata,
        "data": rows,
    }
    return dumps(tree).encode(), {}


def write_npy(answer: Answer) -> tuple[bytes, Headers]:
    """Write npy: one array, its metadata in a header.

    Raises:
        NotAcceptableError: more than one output, or what numpy has no type for.
    """
    _refuse_bfloat16(answer, "npy")
    arrays = answer.arrays()
    if len(arrays) != 1:
        raise NotAcceptableError(
            f"npy holds one array, and {', '.join(arrays)} were asked for",
            hint=f"send `Accept: {NPZ}`, or name one output",
        )
    metadata = dumps(answer.metadata)
    if len(metadata) > _MAX_METADATA_HEADER:
        raise NotAcceptableError(
            f"what belongs to {len(answer.predictions)} pictures does not fit a header",
            hint=f"send `Accept: {NPZ}`, or fewer pictures",
        )
    file = io.BytesIO()
    np.lib.format.write_array(file, next(iter(arrays.values())), allow_pickle=False)
    return file.getvalue(), {METADATA_HEADER: metadata}


def write_npz(answer: Answer) -> tuple[bytes, Headers]:
    """Write npz: every array, and `metadata`, JSON in an array of no dimensions.

    Raises:
        NotAcceptableError: a type that numpy does not have.
    """
    _refuse_bfloat16(answer, "npz")
    file = io.BytesIO()
    arrays: dict[str, Any] = answer.arrays()
    np.savez(file, **arrays, metadata=np.array(dumps(answer.metadata)))
    return file.getvalue(), {}


def write_safetensors(answer: Answer) -> tuple[bytes, Headers]:
    """Write safetensors: every array, and the metadata as JSON under `mimray`.

    Written here, since the library's own writer has no bfloat16 without torch.

    Source: huggingface/safetensors, "Format".
    """
    header: dict[str, Any] = {"__metadata__": {"mimray": dumps(answer.metadata)}}
    arrays = answer.arrays()
    start = 0
    for name, array in arrays.items():
        end = start + array.nbytes
        dtype = _SAFETENSORS_DTYPES[array.dtype.str[1:]]
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [start, end]}
        start = end
    text = dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    length = len(text).to_bytes(8, "little")
    return b"".join((length, text, *(array.tobytes() for array in arrays.values()))), {}


def write_arrow(answer: Answer) -> tuple[bytes, Headers]:
    """Write an Arrow stream: a row for each picture, outputs as flat lists beside their shapes.

    Raises:
        NotAcceptableError: a type that Arrow does not have.
    """
    import pyarrow as pa

    _refuse_bfloat16(answer, "Arrow")
    pictures = answer.metadata["pictures"]
    columns: dict[str, pa.Array] = {"index": pa.array(range(len(pictures)), pa.int32())}
    for name in answer.names:
        parts = [prediction.outputs[name] for prediction in answer.predictions]
        offsets = np.cumsum([0, *(part.size for part in parts)], dtype=np.int64)
        flat = pa.array(np.concatenate([part.reshape(-1) for part in parts]))
        columns[name] = pa.LargeListArray.from_arrays(pa.array(offsets), flat)
        columns[f"{name}_shape"] = pa.array([list(p.shape) for p in parts], pa.list_(pa.int32()))
    for key in pictures[0]:
        rows = [np.ravel(picture[key]).tolist() for picture in pictures]
        columns[key] = pa.array(rows)
    table = pa.table(columns).replace_schema_metadata({"mimray": dumps(answer.metadata)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes(), {}


def _refuse_bfloat16(answer: Answer, kind: str) -> None:
    if answer.is_bfloat16:
        raise NotAcceptableError(
            f"{kind} has no bfloat16", hint=f"send `Accept: {SAFETENSORS}`, or take float16"
        )


JSON = "application/json"
NPY = "application/x-npy"
NPZ = "application/x-npz"
ARROW = "application/vnd.apache.arrow.stream"
SAFETENSORS = "application/vnd.safetensors"

Writer = Callable[[Answer], tuple[bytes, Headers]]
# By preference: the first is given to clients that accept anything.
WRITERS: dict[str, Writer] = {
    JSON: write_json,
    NPY: write_npy,
    NPZ: write_npz,
    "application/zip": write_npz,
    ARROW: write_arrow,
    SAFETENSORS: write_safetensors,
    "application/x-safetensors": write_safetensors,
}


def negotiate(accept: str) -> str:
    """Choose the media type of the answer.

    Args:
        accept: the value of `Accept`; empty for none.

    Raises:
        NotAcceptableError: none of ours is accepted.

    Source: RFC 9110, sec. 12.5.1.
    """
    ranges = _ranges(accept or "*/*")
    best = max(WRITERS, key=lambda media: (_quality(media, ranges), -list(WRITERS).index(media)))
    if _quality(best, ranges) <= 0:
        raise NotAcceptableError(
            f"nothing that `Accept: {accept[:100]}` takes is made here",
            hint=f"there are {', '.join(WRITERS)}",
        )
    return best


def _ranges(accept: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for entry in accept.split(","):
        media, *parameters = (part.strip().lower() for part in entry.split(";"))
        quality = 1.0
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip() == "q":
                try:
                    quality = min(1.0, max(0.0, float(value)))
                except ValueError:
                    quality = 0.0
        if media:
            found[media] = quality
    return found


def _quality(media: str, ranges: dict[str, float]) -> float:
    family = media.partition("/")[0]
    for pattern in (media, f"{family}/*", "*/*"):  # the most specific counts
        if pattern in ranges:
            return ranges[pattern]
    return 0.0
