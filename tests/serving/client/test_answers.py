"""Requests of both clients, and their reading of answers, right and wrong."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mimray.serving.wire.errors import (
    EndpointError,
    InvalidRequestError,
    ModelFailureError,
    OverloadedError,
    UnusablePictureError,
)
from mimray.serving.wire.oip_messages import HEADER_LENGTH, parse_request


def test_embed__many_pictures_in_order_at_once(server: Any, call: Any, tmp_path: Path) -> None:
    def slow_first(handler: Any, body: bytes) -> None:
        time.sleep(0.2)
        server.infer(handler, body)

    server.script.append(slow_first)
    pictures: list[Any] = [bytes([i, 9]) for i in range(40)]
    pictures[3] = tmp_path / "three"
    pictures[3].write_bytes(b"\x03x")
    pictures[5] = str(tmp_path / "three")
    pictures[20] = np.full((4, 5, 3), 20, np.uint8)
    vectors = call("embed", iter(pictures), "m", concurrency=3, options={"batch_size": 4})
    assert (vectors.dtype, vectors.shape) == (np.float32, (40, 4))
    expected = np.arange(40)
    expected[5] = 3
    np.testing.assert_array_equal(vectors[:, 0], expected)
    # 20 pictures in fours, one of pixels, 19 in fours.
    assert len(server.seen) == 5 + 1 + 5
    assert 2 <= server.most_busy <= 3
    assert len(server.ports) <= 3  # connections are used again
    assert all(headers["Content-Type"] for _, headers, _ in server.seen)


def test_embed__says_what_is_asked_for(server: Any, call: Any) -> None:
    call("embed", [b"a"], "m", pooling="gem", size=(32, 48))
    call("embed", [b"a"], "a model/ö", size=224)
    call("embed", [b"a"], "m", size="keep:1024")
    assert [r.parameters for r in server.requests()] == [
        {"pooling": "gem", "size": "32,48"},
        {"size": "224"},
        {"size": "keep:1024"},
    ]
    assert server.seen[1][0] == "/v2/models/a%20model%2F%C3%B6/infer"


def test_embed__no_picture(server: Any, call: Any) -> None:
    outputs = [{"name": "pooled", "shape": [-1, 7]}]
    server.script.append(
        lambda handler, _: handler.answer(200, json.dumps({"outputs": outputs}).encode())
    )
    assert call("embed", [], "m").shape == (0, 7)
    assert call("outputs", [], "m", ["tokens"]) == {}
    assert call("features_many", [], "m") == []


def test_outputs__arrays_by_name(server: Any, call: Any) -> None:
    found = call(
        "outputs", [b"\x05", b"\x06"], "m", ["tokens", "layer_11"], norm=False, size=(32, 48),
        options={"batch_size": 1},
    )  # fmt: skip
    assert list(found) == ["tokens", "layer_11"]
    assert (found["tokens"].shape, found["layer_11"].shape) == ((2, 6, 4), (2, 4, 2, 3))
    np.testing.assert_array_equal(found["tokens"][:, 0, 0], [5, 6])
    assert server.requests()[0].parameters == {"norm": False, "size": "32,48"}
    found["tokens"] += 1  # the caller's own


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [("float32", "f4"), ("float16", "f2"), ("bfloat16", "f4"), ("int8", "f4")],
)
def test_features__everything_is_read_from_the_answer(
    server: Any, call: Any, dtype: str, kept: str
) -> None:
    found = call("features", b"\x08", "m", layers=(-1,), pyramid=True, norm=False, dtype=dtype)
    places = np.arange(6) + 8
    for array in (found.pooled, found.tokens, found.layers[11], found.pyramid[4]):
        assert array.dtype == np.dtype(kept)
        assert array.flags.aligned
        array += 0  # writable
    np.testing.assert_array_equal(found.pooled, [8] * 4)
    np.testing.assert_array_equal(found.tokens[:, 2], places)
    if dtype != "int8":  # of which the server here sends one value a row
        np.testing.assert_array_equal(found.layers[11][1].ravel(), places)
    assert (found.grid, found.stride) == ((2, 3), (16, 16))
    assert (found.source_size, found.input_size) == ((64, 96), (32, 48))
    assert found.valid_region == (0, 0, 48, 32)
    np.testing.assert_array_equal(found.transform @ found.inverse, np.eye(3))
    assert (found.model, found.version, found.weights_sha256) == ("m", "3", "ab")
    assert found.metadata["mean"] == [0.5]
    assert server.requests()[0].parameters == {
        "layers": "-1", "norm": False, "pyramid": True, "binary_data_output": True,
    } | ({} if dtype == "float32" else {"dtype": dtype})  # fmt: skip


def test_features__points_go_both_ways(server: Any, call: Any) -> None:
    found = call("features", np.zeros((64, 96, 3), np.uint8), "m")
    assert found.to_input(96, 64) == (48, 32)
    assert found.to_source(48, 32) == (96, 64)
    for (x, y), place in {(0, 0): 0, (31.9, 0): 0, (32, 31.9): 1, (95, 33): 5, (96, 64): 5}.items():
        assert found.at(x, y)[0] == place
    for outside in ((-1, 0), (97, 0), (0, 65)):
        with pytest.raises(IndexError, match="96 x 64"):
            found.at(*outside)


def test_features_many__order_is_kept_and_memory_bounded(server: Any, call: Any) -> None:
    drawn = 0

    def pictures() -> Iterator[bytes]:
        nonlocal drawn
        for index in range(30):
            drawn = index
            # What is held beyond what is answered stays within two requests a connection.
            assert index - (len(server.seen) - server.busy) <= 2 * 3 + 1
            yield bytes([index])

    found = call("features_many", pictures(), "m", concurrency=3)
    assert [int(f.pooled[0]) for f in found] == list(range(30))
    assert drawn == 29
    assert server.most_busy <= 3


def test_features_many__a_bad_picture_ends_it_and_says_which(server: Any, call: Any) -> None:
    pictures = [{"index": 0, "reason": "not_an_image", "message": "no"}]
    bad = server.refuse(422, error="picture 0 cannot be used: no", pictures=pictures)

    def reply(handler: Any, body: bytes) -> None:
        (picture,) = parse_request(body, handler.headers[HEADER_LENGTH]).inputs[0].data
        (bad if picture == b"\x04" else server.infer)(handler, body)

    server.reply = reply
    with pytest.raises(UnusablePictureError, match="^picture 4 cannot be used") as refused:
        call("features_many", (bytes([i]) for i in range(100)), "m", concurrency=2)
    assert refused.value.details == {"pictures": [{**pictures[0], "index": 4}]}
    assert len(server.seen) < 12


def test_embed__bad_pictures_are_counted_from_the_callers_first(server: Any, call: Any) -> None:
    pictures = [{"index": 1, "reason": "r"}, {"index": 2, "reason": "r"}]
    server.script += [
        server.infer,
        server.refuse(422, error="picture 1 cannot be used", pictures=pictures),
    ]
    with pytest.raises(UnusablePictureError, match="picture 4 cannot") as refused:
        call("embed", [b"a"] * 6, "m", concurrency=1, options={"batch_size": 3})
    assert [p["index"] for p in refused.value.details["pictures"]] == [4, 5]


@pytest.mark.parametrize(
    "body",
    [
        b"<html>hello</html>",
        b"{}",
        b"[" * 100_000,
        b'{"model_name":"m","outputs":[]}',
        b'{"model_name":"m","outputs":[{"name":"pooled","datatype":"BYTES","shape":[1],"data":["aGk="]}]}',
        b'{"model_name":"m","outputs":[{"name":"pooled","datatype":"INT8","shape":[1,1],"data":[1]}]}',
        b'{"model_name":"m","outputs":[{"name":"pooled","datatype":"FP32","shape":[2],"data":[1]}]}',
    ],
)
def test_wrong_answers__are_the_servers_failure(server: Any, call: Any, body: bytes) -> None:
    server.reply = lambda handler, _: handler.answer(200, body)
    with pytest.raises(ModelFailureError):
        call("embed", [b"a"], "m")
    with pytest.raises(ModelFailureError):
        call("features", b"a", "m")
    assert len(server.seen) == 2


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"{}", b"7", b'[{"id": 1}]', b"[7]", b'{"outputs": [{"name": "a"}]}']
)
def test_wrong_answers__descriptions_of_something_else(server: Any, call: Any, body: bytes) -> None:
    server.reply = lambda handler, _: handler.answer(200, body)
    with pytest.raises(ModelFailureError):
        call("embed", [], "m")
    with pytest.raises(ModelFailureError):
        call("models")


@pytest.mark.parametrize(
    "changes",
    [{"pictures": []}, {"pictures": [{}]}, {"version": None}, {"pictures": "none"}],
)
def test_wrong_answers__metadata_that_is_none(
    server: Any, call: Any, changes: dict[str, Any]
) -> None:
    server.reply = lambda handler, body: server.infer(handler, body, **changes)
    with pytest.raises(ModelFailureError, match="does not describe features"):
        call("features", b"a", "m")


def test_wrong_answers__refusals_without_reasons(server: Any, call: Any) -> None:
    server.script += [
        lambda handler, _: handler.answer(500, b"<b>Bad</b> \xff gateway"),
        lambda handler, _: handler.answer(404, b""),
        lambda handler, _: handler.answer(400, b"[1]"),
        lambda handler, _: handler.answer(301, b"", {"Location": "https://elsewhere/"}),
        lambda handler, _: handler.answer(200, b"zipped?", {"Content-Encoding": "gzip"}),
    ]
    with pytest.raises(ModelFailureError, match="gateway"):
        call("models")
    with pytest.raises(EndpointError, match="no reason given"):
        call("models")
    with pytest.raises(InvalidRequestError, match=r"\[1\]"):
        call("models")
    with pytest.raises(ModelFailureError, match="https://elsewhere/"):
        call("models")
    with pytest.raises(OverloadedError, match="decompress"):
        call("models", options={"max_retries": 0})


def test_reconstruct__pictures_come_back_as_files(server: Any, call: Any) -> None:
    uri = "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()
    tree = {
        "grid": [2, 3], "mask": [1, 0, 0, 0, 0, 1], "mask_ratio": 1 / 3, "masked": uri,
        "reconstruction": uri, "raw": None, "panels": [{"title": "target", "image": uri}],
    }  # fmt: skip
    server.reply = lambda handler, _: handler.answer(200, json.dumps(tree).encode())
    found = call("reconstruct", b"jpeg", "a&b", mask_ratio=0.4, seed=3)
    np.testing.assert_array_equal(found.mask, [[True, False, False], [False, False, True]])
    assert (found.masked, found.raw, found.panels) == (b"\x89PNG", None, {"target": b"\x89PNG"})
    assert server.seen[0][0] == "/v1/reconstruct?model=a%26b&seed=3&mask_ratio=0.4"
    assert server.seen[0][2] == b"jpeg"
    call("reconstruct", np.zeros((2, 3, 3), np.uint8), "m")
    assert server.seen[1][2] == b"P6 3 2 255\n" + bytes(18)
    tree["mask"] = [1]
    with pytest.raises(ModelFailureError, match="no reconstruction"):
        call("reconstruct", b"jpeg", "m")


def test_descriptions(server: Any, call: Any) -> None:
    def reply(handler: Any, _: bytes) -> None:
        index = [{"name": "m"}] if handler.path.endswith("index") else {"path": handler.path}
        handler.answer(200, json.dumps(index).encode())

    server.reply = reply
    assert call("models") == ["m"]
    assert call("model", "a b") == {"path": "/v1/models/a%20b"}
    assert call("metadata", "m") == {"path": "/v2/models/m"}
    assert call("ready")
    server.reply = server.refuse(503)
    assert not call("live")
    assert server.seen[-1][0] == "/v2/health/live"
