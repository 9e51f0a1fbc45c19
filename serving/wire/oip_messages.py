"""Messages of the Open Inference Protocol v2 with its binary tensor extension.

One description for both ends: the server parses requests and builds responses, the client
builds requests and parses responses. A body is a JSON part, then raw tensors in the order of
the JSON; `Inference-Header-Content-Length` says where the JSON ends.

Source: kserve/open-inference-protocol, and Triton's `extension_binary_data.md`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import ValidationError

from mimray.serving.wire import bodies
from mimray.serving.wire.bodies import Parameters
from mimray.serving.wire.codecs import (
    Tensor,
    datatype_of,
    decode_binary,
    decode_json,
    encode_binary,
    encode_json,
)
from mimray.serving.wire.errors import InvalidRequestError, TooLargeError, UnsupportedMediaTypeError

HEADER_LENGTH = "Inference-Header-Content-Length"
MAX_JSON_BYTES = 64 * 2**20
MAX_MEMBERS = 100
"""Most members of a compressed body."""
# JSON may end in spaces, and arrays are read in place only where they lie at whole words.
_ALIGNMENT = 8

_Json = TypeVar("_Json", bound=bodies.OipBody)


@dataclass(frozen=True)
class NamedTensor:
    """A named tensor; the items of a `BYTES` tensor are a list, any other is an array."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Tensor


@dataclass(frozen=True)
class RequestedOutput:
    """An output that the client asks for, as raw bytes or as JSON."""

    name: str
    binary: bool = True


@dataclass(frozen=True)
class InferRequest:
    """A parsed inference request.

    Attributes:
        inputs: the input tensors, at least one.
        outputs: the outputs asked for; empty for the model's defaults.
        binary_output: True if default outputs are wanted as raw bytes.
        parameters: the request's parameters.
        id: the client's name for the request, which the response repeats.
    """

    inputs: tuple[NamedTensor, ...]
    outputs: tuple[RequestedOutput, ...] = ()
    binary_output: bool = False
    parameters: Parameters = field(default_factory=dict)
    id: str | None = None


@dataclass(frozen=True)
class InferResponse:
    """A parsed inference response."""

    model_name: str
    model_version: str
    outputs: dict[str, Tensor]
    parameters: Parameters
    id: str | None


@dataclass(frozen=True)
class Body:
    """Bytes on the wire and the headers that describe them."""

    content: bytes
    headers: dict[str, str]


def parse_request(body: bytes, header_length: str | None) -> InferRequest:
    """Read an inference request.

    Args:
        body: the whole body, decompressed.
        header_length: the value of `Inference-Header-Content-Length`; None if all is JSON, `0` if
            the body is one encoded picture and nothing else.

    Raises:
        InvalidRequestError: the body breaks the protocol.
    """
    if header_length == "0":
        picture = NamedTensor("image", "BYTES", (1,), [body])
        return InferRequest((picture,), binary_output=True)
    text, tail = _split(body, header_length)
    message = _parse(text, bodies.InferRequest)
    binary_output = _flag(message.parameters, "binary_data_output", default=False)
    return InferRequest(
        inputs=_tensors(message.inputs, tail),
        outputs=tuple(
            RequestedOutput(o.name, _flag(o.parameters, "binary_data", default=binary_output))
            for o in message.outputs
        ),
        binary_output=binary_output,
        parameters=message.parameters,
        id=message.id,
    )


def build_request(
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    parameters: Parameters | None = None,
) -> Body:
    """Write an inference request with binary tensors both ways.

    Args:
        inputs: the input tensors by name.
        outputs: names of the outputs; none for the model's defaults.
        parameters: the request's parameters.
    """
    tensors, blobs = _describe((name, tensor, True) for name, tensor in inputs.items())
    message: dict[str, Any] = {
        "inputs": tensors,
        "outputs": [{"name": name, "parameters": {"binary_data": True}} for name in outputs],
    }
    if parameters:
        message["parameters"] = parameters
    return _join(message, blobs)


def build_response(
    request: InferRequest,
    tensors: Mapping[str, Tensor],
    *,
    model_name: str,
    model_version: str,
    parameters: Parameters,
) -> Body:
    """Write the response to a request.

    Args:
        request: the request; its outputs are written, or all tensors if it names none.
        tensors: the outputs by name.
        model_name: the model's name.
        model_version: the model's version.
        parameters: the response's parameters.
    """
    wanted = request.outputs or tuple(
        RequestedOutput(name, request.binary_output) for name in tensors
    )
    described, blobs = _describe((o.name, tensors[o.name], o.binary) for o in wanted)
    message: dict[str, Any] = {
        "model_name": model_name,
        "model_version": model_version,
        "parameters": parameters,
        "outputs": described,
    }
    if request.id is not None:
        message["id"] = request.id
    return _join(message, blobs)


def parse_response(body: bytes | bytearray, header_length: str | None) -> InferResponse:
    """Read an inference response; arrays are views of the body, writable if it is a bytearray.

    Args:
        body: the whole body, decompressed.
        header_length: the value of `Inference-Header-Content-Length`; None if all is JSON.

    Raises:
        InvalidRequestError: the body breaks the protocol.
    """
    text, tail = _split(body, header_length)
    message = _parse(text, bodies.InferResponse)
    return InferResponse(
        model_name=message.model_name,
        model_version=message.model_version,
        outputs={tensor.name: tensor.data for tensor in _tensors(message.outputs, tail)},
        parameters=message.parameters,
        id=message.id,
    )


def inflate(body: bytes, encoding: str, *, max_bytes: int) -> bytes:
    """Undo a gzip or deflate `Content-Encoding`.

    Args:
        body: the body as it came.
        encoding: the value of `Content-Encoding`; empty for none.
        max_bytes: most bytes that come out; no more are produced.

    Raises:
        UnsupportedMediaTypeError: another encoding.
        TooLargeError: more than `max_bytes` would come out.
        InvalidRequestError: damaged data.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "deflate"):
        raise UnsupportedMediaTypeError(
            f"Content-Encoding {encoding!r} is not supported", hint="use gzip, deflate or none"
        )
    parts: list[bytes] = []
    left = max_bytes
    # A gzip body may have several members, one after the other (RFC 1952, sec. 2.2).
    for _ in range(MAX_MEMBERS):
        inflater = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # 32: zlib or gzip, by its header
        try:
            parts.append(inflater.decompress(body, left + 1))
        except zlib.error as error:
            raise InvalidRequestError(f"the body is not valid {encoding}: {error}") from error
        left -= len(parts[-1])
        if left < 0:
            raise TooLargeError(f"the body inflates to more than {max_bytes} bytes")
        if not inflater.eof:
            raise InvalidRequestError(f"the {encoding} body ends too early")
        body = inflater.unused_data
        if not body:
            return b"".join(parts)
    raise TooLargeError(f"the {encoding} body has more than {MAX_MEMBERS} members")


def _split(body: bytes | bytearray, header_length: str | None) -> tuple[memoryview, memoryview]:
    view = memoryview(body)
    if header_length is None:
        length = len(view)
    elif not (header_length.isascii() and header_length.isdigit()):
        raise InvalidRequestError(f"{HEADER_LENGTH} is {header_length!r}, not a number")
    elif (length := int(header_length[:20])) > len(view):
        raise InvalidRequestError(
            f"{HEADER_LENGTH} is {header_length}, but the body has {len(view)} bytes"
        )
    if length > MAX_JSON_BYTES:
        raise TooLargeError(
            f"the JSON part has {length} bytes, more than {MAX_JSON_BYTES}",
            hint="send tensors as binary data",
        )
    return view[:length], view[length:]


def _parse(text: memoryview, kind: type[_Json]) -> _Json:
    try:
        value = json.loads(bytes(text))
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not JSON: {error}") from error
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        raise InvalidRequestError(f"{where}: {first['msg']}") from error


def _flag(parameters: Parameters, name: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InvalidRequestError(f"parameter `{name}` must be true or false")
    return value


def _tensors(described: Sequence[bodies.Tensor], tail: memoryview) -> tuple[NamedTensor, ...]:
    """The tensors of a message; raw ones lie in `tail` one after the other and fill it."""
    tensors = []
    position = 0
    for tensor in described:
        shape = tuple(tensor.shape)
        if any(side < 0 for side in shape):
            raise InvalidRequestError(f"{tensor.name}: shape {list(shape)} has a negative side")
        size = tensor.parameters.get("binary_data_size")
        try:
            if size is None:
                data = decode_json(tensor.data, tensor.datatype, shape)
            else:
                if tensor.data is not None:
                    raise InvalidRequestError("has both `data` and `binary_data_size`")
                if isinstance(size, bool) or not isinstance(size, int) or size < 0:
                    raise InvalidRequestError("`binary_data_size` must be a count of bytes")
                if position + size > len(tail):
                    raise InvalidRequestError(
                        f"states {size} bytes of binary data, but {len(tail) - position} are left"
                    )
                data = decode_binary(tail[position : position + size], tensor.datatype, shape)
                position += size
        except InvalidRequestError as error:
            raise InvalidRequestError(
                f"tensor {tensor.name!r}: {error.args[0]}", hint=error.hint
            ) from error
        tensors.append(NamedTensor(tensor.name, tensor.datatype, shape, data))
    if position != len(tail):
        raise InvalidRequestError(
            f"{len(tail) - position} bytes of binary data belong to no tensor",
            hint=f"check `binary_data_size` and {HEADER_LENGTH}",
        )
    return tuple(tensors)


def _describe(
    tensors: Iterator[tuple[str, Tensor, bool]],
) -> tuple[list[dict[str, Any]], list[bytes]]:
    described: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for name, tensor, binary in tensors:
        entry: dict[str, Any] = {
            "name": name,
            "datatype": "BYTES" if isinstance(tensor, list) else datatype_of(tensor),
            "shape": [len(tensor)] if isinstance(tensor, list) else list(tensor.shape),
        }
        if binary:
            blobs.append(encode_binary(tensor))
            entry["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            entry["data"] = encode_json(tensor)
        described.append(entry)
    return described, blobs


def _join(message: dict[str, Any], blobs: list[bytes]) -> Body:
    text = json.dumps(message, separators=(",", ":"), allow_nan=False).encode()
    if not blobs:
        return Body(text, {"Content-Type": "application/json"})
    text += b" " * (-len(text) % _ALIGNMENT)
    headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(text))}
    return Body(b"".join((text, *blobs)), headers)
