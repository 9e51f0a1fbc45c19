"""Tensors as bytes and as JSON, in the datatypes of the Open Inference Protocol.

Binary tensors are little-endian and row-major. A `BYTES` tensor is a one-dimensional list of
items, each a 32-bit little-endian length and that many bytes; in JSON its items are base64.
numpy has no bfloat16: a `BF16` tensor is the uint16 array of its bits, and numbers in JSON.
Nothing is reshaped: data of another shape than the stated one are refused.
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from mimray.serving.wire.errors import InvalidRequestError

DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype("<u2"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "INT8": np.dtype("|i1"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "UINT8": np.dtype("|u1"),
}
_WHOLE = ("INT8", "INT32", "INT64", "UINT8")
_LENGTH = struct.Struct("<I")

Array = np.ndarray[Any, Any]
Tensor = Array | list[bytes]


def widen_bfloat16(bits: Array) -> Array:
    """Convert bfloat16, given as uint16 of its bits, to float32."""
    widened = bits.astype(np.uint32)
    widened <<= 16
    return widened.view(np.float32)


def narrow_bfloat16(values: Array) -> Array:
    """Convert float32 to the nearest bfloat16, ties to even, given as uint16 of its bits."""
    bits = np.asarray(values, np.float32, order="C").view(np.uint32)
    # Half of what is cut off carries into what stays; NaN would carry into infinity.
    nearest = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)


def datatype_of(array: Array) -> str:
    """The protocol's name for the array's dtype."""
    for name, dtype in DTYPES.items():
        if array.dtype == dtype:
            return name
    raise InvalidRequestError(
        f"dtype {array.dtype} has no protocol datatype here", hint=f"use one of {_known()}"
    )


def encode_binary(tensor: Tensor) -> bytes:
    """Write a tensor as raw bytes.

    Args:
        tensor: an array of one of the known dtypes, or the items of a `BYTES` tensor.
    """
    if isinstance(tensor, list):
        return b"".join(part for item in tensor for part in (_LENGTH.pack(len(item)), item))
    return tensor.astype(DTYPES[datatype_of(tensor)], copy=False).tobytes(order="C")


def decode_binary(data: memoryview, datatype: str, shape: tuple[int, ...]) -> Tensor:
    """Read a tensor from raw bytes, which it must fill exactly.

    Args:
        data: the raw bytes.
        datatype: the protocol's name of the datatype.
        shape: the stated shape.

    Raises:
        InvalidRequestError: unknown datatype, or size and shape disagree.
    """
    if datatype == "BYTES":
        return _split_items(data, _item_count(shape))
    dtype = _dtype(datatype)
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise InvalidRequestError(
            f"{datatype} {list(shape)} takes {expected} bytes, but {len(data)} came"
        )
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def encode_json(tensor: Tensor) -> list[Any]:
    """Write a tensor as the flat, row-major list that the protocol puts into JSON."""
    if isinstance(tensor, list):
        return [base64.b64encode(item).decode("ascii") for item in tensor]
    if datatype_of(tensor) == "BF16":
        tensor = widen_bfloat16(tensor)
    values: list[Any] = tensor.ravel(order="C").tolist()
    return values


def decode_json(data: Any, datatype: str, shape: tuple[int, ...]) -> Tensor:
    """Read a tensor from a JSON list, flat in row-major order or nested like `shape`.

    Args:
        data: the value of `data`.
        datatype: the protocol's name of the datatype.
        shape: the stated shape.

    Raises:
        InvalidRequestError: wrong type, range, count or nesting.
    """
    if not isinstance(data, list):
        raise InvalidRequestError("`data` must be a list")
    if datatype == "BYTES":
        return _decode_base64_items(data, _item_count(shape))
    dtype = _dtype(datatype)
    try:
        values = np.asarray(data)
    except ValueError as error:
        raise InvalidRequestError("`data` is nested unevenly") from error
    whole = datatype in _WHOLE
    if values.size == 0:
        values = values.astype(dtype)
    if values.dtype.kind not in ("iu" if whole else "iuf"):
        raise InvalidRequestError(f"`data` holds something that is not {datatype}")
    if whole and values.size:
        limits = np.iinfo(dtype)
        if values.min() < limits.min or values.max() > limits.max:
            raise InvalidRequestError(
                f"`data` leaves the range of {datatype}, {limits.min} to {limits.max}"
            )
    if values.shape not in (shape, (math.prod(shape),)):
        raise InvalidRequestError(
            f"`data` has shape {list(values.shape)}, but {list(shape)} is stated",
            hint="give a flat row-major list or one nested like the shape",
        )
    with np.errstate(over="ignore"):  # what is too large becomes infinity, as in binary
        if datatype == "BF16":
            values = narrow_bfloat16(values.astype(np.float32))
        return values.astype(dtype, copy=False).reshape(shape)


def _decode_base64_items(data: list[Any], count: int) -> list[bytes]:
    if len(data) != count:
        raise InvalidRequestError(f"`data` has {len(data)} items, but shape states {count}")
    if not all(isinstance(item, str) for item in data):
        raise InvalidRequestError("items of a BYTES tensor must be base64 strings in JSON")
    try:
        return [base64.b64decode(item, validate=True) for item in data]
    except (binascii.Error, ValueError) as error:
        raise InvalidRequestError(
            f"an item of a BYTES tensor is not base64: {error}",
            hint="send raw bytes as a binary tensor instead",
        ) from error


def _split_items(data: memoryview, count: int) -> list[bytes]:
    items: list[bytes] = []
    position = 0
    for index in range(count):
        start = position + _LENGTH.size
        if start > len(data):
            raise InvalidRequestError(f"the BYTES tensor ends before item {index}")
        (length,) = _LENGTH.unpack(data[position:start])
        position = start + length
        if position > len(data):
            raise InvalidRequestError(f"the BYTES tensor ends inside item {index}")
        items.append(bytes(data[start:position]))
    if position != len(data):
        raise InvalidRequestError(
            f"{len(data) - position} bytes follow the {count} items of the BYTES tensor"
        )
    return items


def _item_count(shape: Sequence[int]) -> int:
    if len(shape) != 1:
        raise InvalidRequestError(f"a BYTES tensor has shape [B] here, not {list(shape)}")
    return shape[0]


def _dtype(datatype: str) -> np.dtype[Any]:
    if datatype not in DTYPES:
        raise InvalidRequestError(
            f"datatype {datatype!r} is not supported", hint=f"use one of {_known()}"
        )
    return DTYPES[datatype]


def _known() -> str:
    return ", ".join(["BYTES", *DTYPES])
