"""Pictures, addresses and keys that callers give, and what never leaves the client."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from mimray.serving.client import FeatureClient
from mimray.serving.client.images import MAX_CHUNK_BYTES, chunks, picture_file
from mimray.trainers.errors import ServingError


def test_headers__key_and_trace(server: Any, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server.reply = lambda handler, _: handler.answer(200, b"[]")
    monkeypatch.delenv("MIMRAY_API_KEY", raising=False)
    call("models")
    monkeypatch.setenv("MIMRAY_API_KEY", "from-env")
    traces = iter("ab")
    call("models", options={"headers": lambda: {"traceparent": next(traces)}})
    call("models", options={"headers": {"X-Own": "1"}, "api_key": "given"})
    call("models", options={"api_key": ""})
    seen = [headers for _, headers, _ in server.seen]
    keys = [headers.get("Authorization") for headers in seen]
    assert keys == [None, "Bearer from-env", "Bearer given", None]
    assert (seen[1]["traceparent"], seen[2]["X-Own"]) == ("a", "1")


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (np.zeros((4, 4, 3), np.float32), r"uint8 \[H, W, C\]"),
        (np.zeros((4, 4), np.uint8), r"uint8 \[H, W, C\]"),
        ("https://example.org/cat.jpg", "is no path"),
        ("nowhere.jpg", "cannot be read"),
        ("nul\0", "cannot be read"),
        (7, "int is no picture"),
    ],
)
def test_images__what_is_none_is_refused_before_anything_is_sent(
    server: Any, call: Any, image: Any, complaint: str
) -> None:
    for method, argument in (("embed", [b"a", image]), ("features", image)):
        with pytest.raises(ServingError, match=complaint):
            call(method, argument, "m", options={"batch_size": 8})
    with pytest.raises(ServingError, match=complaint):
        call("reconstruct", image, "m")
    assert not server.seen


def test_images__requests_hold_so_many_bytes() -> None:
    third = bytes(MAX_CHUNK_BYTES // 3)
    sizes = [len(chunk.images) for chunk in chunks([third] * 7 + [third * 4, b""], 16)]
    assert sizes == [3, 3, 1, 1, 1]
    with pytest.raises(ServingError, match="5 channels"):
        picture_file(np.zeros((1, 1, 5), np.uint8))


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://a:port", ""])
def test_client__refuses_what_is_no_address(url: str) -> None:
    with pytest.raises(ServingError, match="no address"):
        FeatureClient(url)


def test_client__refuses_what_cannot_be(server: Any, call: Any) -> None:
    for wrong in ({"batch_size": 0}, {"max_retries": -1}, {"deadline_s": 0}, {"timeout_s": -1}):
        with pytest.raises(ServingError):
            call("models", options=wrong)
    with pytest.raises(ServingError, match="concurrency"):
        call("embed", [b"a", b"b"], "m", concurrency=0, options={"batch_size": 1})
    with pytest.raises(ServingError, match="API key") as refused:
        call("models", options={"api_key": "secret\n"})
    assert "secret" not in str(refused.value)
    assert not server.seen


def test_import__is_light() -> None:
    code = (
        "import sys, mimray.serving.client; "
        "print(sorted({'torch', 'ray', 'timm', 'PIL', 'starlette'} & sys.modules.keys()))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["http_proxy", "all_proxy"])
def test_proxy__an_endpoint_of_this_machine_is_asked_directly(
    server: Any, call: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert call("embed", [b"\x07"], "m")[0, 0] == 7
