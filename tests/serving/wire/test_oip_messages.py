from __future__ import annotations

import contextlib
import gzip
import json
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimray.serving.wire.errors import InvalidRequestError, TooLargeError, UnsupportedMediaTypeError
from mimray.serving.wire.oip_messages import (
    HEADER_LENGTH,
    InferRequest,
    NamedTensor,
    RequestedOutput,
    build_request,
    build_response,
    inflate,
    parse_request,
    parse_response,
)


def _json(**changes: object) -> bytes:
    message = {
        "inputs": [{"name": "image", "datatype": "UINT8", "shape": [2], "data": [1, 2]}],
        **changes,
    }
    return json.dumps(message).encode()


@given(st.lists(st.binary(max_size=30), min_size=1, max_size=4))
def test_request__round_trip_of_pictures(items: list[bytes]) -> None:
    body = build_request({"image": items}, ["pooled"], {"dtype": "FP16"})
    request = parse_request(body.content, body.headers[HEADER_LENGTH])
    assert request.inputs == (NamedTensor("image", "BYTES", (len(items),), items),)
    assert request.outputs == (RequestedOutput("pooled", binary=True),)
    assert request.parameters == {"dtype": "FP16"}


@pytest.mark.parametrize("binary", [True, False])
def test_response__round_trip_keeps_values_types_and_id(binary: bool) -> None:
    request = InferRequest(inputs=(), binary_output=binary, id="seven")
    tensors = {
        "tokens": np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4),
        "pooled": np.ones((2, 4), np.float16),
        "source_size": np.array([[3, 2**40]], np.int64),
    }
    body = build_response(
        request, tensors, model_name="m", model_version="1", parameters={"grid": "1,3"}
    )
    assert (HEADER_LENGTH in body.headers) is binary
    response = parse_response(body.content, body.headers.get(HEADER_LENGTH))
    assert response.id == "seven"
    assert response.parameters == {"grid": "1,3"}
    assert list(response.outputs) == list(tensors)
    for name, tensor in tensors.items():
        assert response.outputs[name].dtype == tensor.dtype
        np.testing.assert_array_equal(response.outputs[name], tensor)


@given(st.integers(0, 30), st.integers(1, 4))
def test_binary__tensors_lie_at_whole_words(length: int, count: int) -> None:
    tensors = {f"{'x' * length}{index}": np.arange(2.0) for index in range(count)}
    body = build_response(
        InferRequest(inputs=(), binary_output=True), tensors, model_name="m", model_version="1",
        parameters={},
    )  # fmt: skip
    assert int(body.headers[HEADER_LENGTH]) % 8 == 0
    response = parse_response(bytearray(body.content), body.headers[HEADER_LENGTH])
    for array in response.outputs.values():
        assert isinstance(array, np.ndarray)
        assert array.flags.aligned
        assert array.flags.writeable
        np.testing.assert_array_equal(array, [0, 1])


def test_response__outputs_choose_binary_one_by_one() -> None:
    outputs = (RequestedOutput("b", binary=False), RequestedOutput("a", binary=True))
    request = InferRequest(inputs=(), outputs=outputs)
    tensors = {"a": np.zeros(2, np.float32), "b": np.ones(1, np.float32)}
    body = build_response(request, tensors, model_name="m", model_version="1", parameters={})
    length = int(body.headers[HEADER_LENGTH])
    described = json.loads(body.content[:length])["outputs"]
    assert described[0] == {"name": "b", "datatype": "FP32", "shape": [1], "data": [1.0]}
    assert described[1]["parameters"] == {"binary_data_size": 8}
    assert body.content[length:] == bytes(8)


def test_parse_request__raw_body_is_one_picture() -> None:
    request = parse_request(b"\xff\xd8 jpeg", "0")
    assert request.inputs == (NamedTensor("image", "BYTES", (1,), [b"\xff\xd8 jpeg"]),)
    assert request.binary_output


@pytest.mark.parametrize(
    ("body", "header_length"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b"\xff\xfe", None),
        (b"[" * 100_000, None),
        (b"{}", None),
        (_json(inputs=[]), None),
        (_json(id=7), None),
        (_json(), "-1"),
        (_json(), "many"),
        (_json(), "99999"),
        (_json(), "\u00b2"),
        (_json() + b"tail", str(len(_json()))),
        (_json(outputs=[{"name": "a", "parameters": {"binary_data": "yes"}}]), None),
        (_json(inputs=[{"name": "i", "datatype": "UINT8", "shape": [-2], "data": [1, 2]}]), None),
        (_json(inputs=[{"name": "i", "datatype": "UINT8", "shape": ["2"], "data": [1]}]), None),
        (
            _json(
                inputs=[
                    {
                        "name": "i",
                        "datatype": "UINT8",
                        "shape": [9],
                        "parameters": {"binary_data_size": 9},
                    }
                ]
            ),
            None,
        ),
    ],
)
def test_parse_request__refuses_what_is_not_the_protocol(
    body: bytes, header_length: str | None
) -> None:
    with pytest.raises(InvalidRequestError):
        parse_request(body, header_length)


@given(st.binary(max_size=200), st.none() | st.text(max_size=5) | st.integers(1, 99).map(str))
@settings(max_examples=300)
def test_parse_request__arbitrary_bytes_never_break_it(
    body: bytes, header_length: str | None
) -> None:
    with contextlib.suppress(InvalidRequestError, TooLargeError):
        parse_request(body, header_length)


@pytest.mark.parametrize(
    ("encoding", "compress"),
    [("gzip", gzip.compress), ("deflate", zlib.compress), ("", bytes), ("identity", bytes)],
)
def test_inflate__undoes_encoding(encoding: str, compress: object) -> None:
    assert callable(compress)
    assert inflate(compress(b"abc" * 99), encoding, max_bytes=297) == b"abc" * 99


def test_inflate__bounded_and_checked() -> None:
    bomb = gzip.compress(bytes(10_000_000))
    with pytest.raises(TooLargeError):
        inflate(bomb, "gzip", max_bytes=1_000_000)
    with pytest.raises(InvalidRequestError, match="too early"):
        inflate(gzip.compress(b"abc")[:-3], "gzip", max_bytes=100)
    with pytest.raises(InvalidRequestError):
        inflate(b"plain", "gzip", max_bytes=100)
    with pytest.raises(UnsupportedMediaTypeError):
        inflate(b"", "br", max_bytes=100)


def test_inflate__every_member_of_a_body() -> None:
    members = gzip.compress(b"abc") + gzip.compress(b"") + gzip.compress(b"def" * 9)
    assert inflate(members, "gzip", max_bytes=30) == b"abc" + b"def" * 9
    with pytest.raises(TooLargeError, match="more than 29 bytes"):
        inflate(members, "gzip", max_bytes=29)
    with pytest.raises(TooLargeError, match="more than 100 members"):
        inflate(gzip.compress(b"") * 101, "gzip", max_bytes=30)
    with pytest.raises(InvalidRequestError, match="ends too early"):
        inflate(members[:-2], "gzip", max_bytes=100)
    for after in (b"and more", b"\0\0"):
        with pytest.raises(InvalidRequestError, match="not valid gzip"):
            inflate(members + after, "gzip", max_bytes=100)
