"""A server that misbehaves on demand, and both clients as one."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from mimray.serving.client import AsyncFeatureClient, FeatureClient
from mimray.serving.wire.codecs import narrow_bfloat16
from mimray.serving.wire.oip_messages import (
    HEADER_LENGTH,
    InferRequest,
    build_response,
    parse_request,
)

GRID, WIDTH = (2, 3), 4
PICTURE = {
    "source_size": (64, 96),
    "input_size": (32, 48),
    "grid": GRID,
    "stride": (16, 16),
    "transform": [[0.5, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 1.0]],
    "inverse": [[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0]],
    "valid_region": (0.0, 0.0, 48.0, 32.0),
}

Reply = Callable[["_Handler", bytes], None]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server = self.server
        with server.lock:
            server.seen.append((self.path, dict(self.headers), body))
            server.ports.add(self.client_address[1])
            reply = server.script.popleft() if server.script else server.reply
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
        try:
            reply(self, body)
        finally:
            with server.lock:
                server.busy -= 1

    def answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def hang_up(self, *sent: bytes) -> None:
        """Send some bytes and reset the connection."""
        self.wfile.write(b"".join(sent))
        self.wfile.flush()
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Replies by `script`, one a request; when it is through, by `reply`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.Lock()
        self.script: deque[Reply] = deque()
        self.reply: Reply = self.infer
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        self.ports: set[int] = set()
        self.busy = self.most_busy = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def requests(self) -> list[Any]:
        """The inference requests that came, parsed."""
        return [parse_request(body, headers.get(HEADER_LENGTH)) for _, headers, body in self.seen]

    @staticmethod
    def infer(handler: _Handler, body: bytes, **changes: Any) -> None:
        """Answer as an endpoint whose `pooled` is a picture's first byte, four times.

        `changes` are of the metadata.
        """
        request = parse_request(body, handler.headers.get(HEADER_LENGTH))
        data = request.inputs[0].data
        first = [p[0] if isinstance(p, bytes) else p.flat[0] for p in data]
        metadata = {
            "model": "m",
            "version": "3",
            "weights_sha256": "ab",
            "mean": [0.5],
            "pictures": [PICTURE] * len(first),
            **changes,
        }
        answer = build_response(
            request,
            _tensors(request, np.array(first, np.float32)),
            model_name="m",
            model_version="3",
            parameters={"metadata": json.dumps(metadata)},
        )
        handler.answer(200, answer.content, answer.headers)

    @staticmethod
    def refuse(status: int, headers: Mapping[str, str] | None = None, **members: Any) -> Reply:
        """A problem JSON."""
        problem = {"title": "T", "status": status, "error": "no", **members}
        body = json.dumps(problem).encode()
        return lambda handler, _: handler.answer(status, body, headers)

    @staticmethod
    def drop(handler: _Handler, _: bytes) -> None:
        """No answer."""
        handler.hang_up()

    @staticmethod
    def truncate(handler: _Handler, _: bytes) -> None:
        """Half an answer."""
        handler.hang_up(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")


def _tensors(request: InferRequest, first: np.ndarray) -> dict[str, np.ndarray]:
    pooled = first[:, None].repeat(WIDTH, 1)
    places = np.arange(GRID[0] * GRID[1], dtype=np.float32)
    tokens = pooled[:, None, :] + places[None, :, None]
    maps = tokens.transpose(0, 2, 1).reshape(len(first), WIDTH, *GRID)
    known = {"pooled": pooled, "tokens": tokens, "layer_11": maps, "pyramid_4": maps}
    given = request.parameters
    absent = {"layer_11": "layers" not in given, "pyramid_4": "pyramid" not in given}
    names = [o.name for o in request.outputs] or [n for n in known if not absent.get(n)]
    tensors = {name: known[name] for name in names}
    match given.get("dtype"):
        case "float16":
            return {name: array.astype(np.float16) for name, array in tensors.items()}
        case "bfloat16":
            return {name: narrow_bfloat16(array) for name, array in tensors.items()}
        case "int8":
            twos = {name: np.full(array.shape, 2, np.int8) for name, array in tensors.items()}
            halves = {
                f"{name}_scale": array.max(axis=-1, keepdims=True) / 2
                for name, array in tensors.items()
            }
            return twos | halves
        case _:
            return tensors


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Both:
    """Calls a method of one of the clients, made for this call alone."""

    def __init__(self, url: str, kind: str) -> None:
        self._url = url
        self._kind = kind

    def at(self, url: str) -> Both:
        return Both(url, self._kind)

    def __call__(self, method: str, *args: Any, options: Any = None, **named: Any) -> Any:
        kwargs = {"deadline_s": 10.0, **(options or {})}
        if self._kind == "sync":
            with FeatureClient(self._url, **kwargs) as client:
                result = getattr(client, method)(*args, **named)
                return list(result) if method == "features_many" else result

        async def call() -> Any:
            async with AsyncFeatureClient(self._url, **kwargs) as client:
                result = getattr(client, method)(*args, **named)
                if method == "features_many":
                    return [features async for features in result]
                return await result

        return asyncio.run(call())


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest, server: Server) -> Both:
    return Both(server.url, request.param)
