"""The gateway before every route: keys, limits, request ids, the access log, spans."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from opentelemetry.trace import Span, format_trace_id
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mimray.serving.api.access_log import AccessLog
from mimray.serving.api.keys import KeyRing, Quota
from mimray.serving.config import MIB, Limits
from mimray.serving.operations.calls import Reply, problem_reply
from mimray.serving.telemetry.metrics import Metrics
from mimray.serving.telemetry.tracing import Tracer, trace_headers
from mimray.serving.wire.errors import (
    EndpointError,
    InvalidRequestError,
    ModelFailureError,
    OverloadedError,
    TimedOutError,
    TooLargeError,
    openai_problem,
)
from mimray.serving.wire.oip_messages import inflate

logger = logging.getLogger(__name__)

# Larger bodies are inflated in a thread, so that they hold nothing up.
_INFLATE_ASIDE_BYTES = 1 << 20
# Routes that OpenAI's clients ask, which look for an object under `error`.
_OPENAI_PATHS = ("/v1/embeddings", "/v1/models")
CLIENT_CLOSED_REQUEST = 499
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(frozen=True)
class GatewayParts:
    """The parts of a gateway that its replica configures.

    Attributes:
        limits: the endpoint's limits, as in `serve.yaml`.
        keys: the known keys; None admits everybody.
        access_log: the log that gets a line for each request.
        tracer: exports a span for each request.
        metrics: counts the refusals that no model counts.
        cors_origins: origins whose pages browsers let ask.
    """

    limits: Limits
    keys: KeyRing | None
    access_log: AccessLog
    tracer: Tracer
    metrics: Metrics
    cors_origins: tuple[str, ...] = ()

    def close(self) -> None:
        """Write and send what is left."""
        self.access_log.close()
        self.tracer.close()


class Bodies:
    """Reads request bodies within limits.

    Args:
        limits: the endpoint's limits, as in `serve.yaml`.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held = 0

    async def read(self, request: Request) -> bytes:
        """Read a request's body and inflate it; a stated length is not trusted.

        Its bytes count as held until `release`, which `Gateway` calls.

        Raises:
            TooLargeError: it is too large.
            TimedOutError: it came too slowly.
            OverloadedError: there is no room for it now.
            InvalidRequestError: it is shorter than stated, or its length is no number.
        """
        most = self._limits.body_mib * MIB
        refusal = TooLargeError(f"the body has more than {most} bytes")
        stated = request.headers.get("content-length", "0")
        if not (stated.isascii() and stated.isdigit()):
            raise InvalidRequestError(f"Content-Length is {stated[:40]!r}, not a number")
        if int(stated[:20]) > most:
            raise refusal
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > most:
                        raise refusal
                    self._hold(request, len(chunk))
                    chunks.append(chunk)
        except TimeoutError:
            raise TimedOutError(
                f"the body did not come within {self._limits.body_timeout_s:g} s"
            ) from None
        body = b"".join(chunks)
        encoding = request.headers.get("content-encoding", "")
        if len(body) > _INFLATE_ASIDE_BYTES and encoding:
            return await asyncio.to_thread(inflate, body, encoding, max_bytes=most)
        return inflate(body, encoding, max_bytes=most)

    def _hold(self, request: Request, size: int) -> None:
        if self._held + size > self._limits.bodies_mib * MIB:
            raise OverloadedError("too many requests with large bodies at once")
        self._held += size
        request.scope["mimray.held"] = request.scope.get("mimray.held", 0) + size

    def release(self, scope: Scope) -> None:
        """Stop counting the bytes that a request held."""
        self._held -= scope.pop("mimray.held", 0)


class Gateway:
    """Middleware that admits requests and accounts for them.

    The application gets the full path, whatever prefix Ray mounted it under.

    Args:
        app: the guarded application.
        bodies: the reader of bodies, which the application uses, too.
        parts: keys, access log, tracer and metrics.
        open_paths: paths answered without a key; those that end in `/` are prefixes.
    """

    def __init__(
        self, app: ASGIApp, *, bodies: Bodies, parts: GatewayParts, open_paths: Iterable[str]
    ) -> None:
        self._app = app
        self._bodies = bodies
        self._keys = parts.keys
        self._quota = Quota()
        self._log = parts.access_log
        self._tracer = parts.tracer
        self._metrics = parts.metrics
        self._open = frozenset(open_paths)
        self._open_folders = tuple(
            path for path in self._open if path.endswith("/") and path != "/"
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Admit or refuse a request, and account for it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        notes: dict[str, Any] = {}
        scope = {**scope, "root_path": "", "mimray.notes": notes}
        headers = Headers(scope=scope)
        started = time.perf_counter()
        span = self._tracer.start(headers)
        notes["request_id"] = _request_id(headers)
        trace = scope["mimray.trace"] = trace_headers(span)
        sent = _Sent(send, {name: trace[name] for name in trace if name == "traceparent"})
        try:
            self._admit(scope, headers)
            await self._app(scope, receive, sent)
        except EndpointError as error:
            reply = problem_reply(error)
            notes.update(reply.notes)
            await send_reply(reply, scope, sent)
        except ClientDisconnect:
            sent.status = CLIENT_CLOSED_REQUEST
        except Exception as error:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if sent.begun:
                raise
            reply = problem_reply(ModelFailureError(f"unexpected {type(error).__name__}"))
            notes.update(reply.notes)
            await send_reply(reply, scope, sent)
        finally:
            self._bodies.release(scope)
            self._account(scope, sent, span, started)

    def _admit(self, scope: Scope, headers: Headers) -> None:
        if scope["path"] in self._open or scope["path"].startswith(self._open_folders):
            return
        if self._keys is None:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        presented = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key")
        key = self._keys.admit(presented)
        scope["mimray.notes"]["key"] = key.name
        self._quota.admit(key)
        scope["mimray.key"] = key

    def _account(self, scope: Scope, sent: _Sent, span: Span, started: float) -> None:
        notes = scope["mimray.notes"]
        if "mimray.key" in scope and notes.get("pictures"):
            self._quota.charge(scope["mimray.key"], int(notes["pictures"]))
        seconds = time.perf_counter() - started
        client = scope.get("client")
        if "error" in notes and "version" not in notes:  # no model has counted it
            self._metrics.rejected(str(notes["error"]))
        # A span's name has to be one of few; paths are without number.
        name = " ".join([scope["method"], *([notes["operation"]] if "operation" in notes else [])])
        attributes = {
            "http.request.method": scope["method"],
            "http.response.status_code": sent.status,
            "url.path": scope["path"],
            **{f"mimray.{name}": notes[name] for name in ("pictures", "version") if name in notes},
        }
        self._tracer.finish(span, name, attributes)
        self._log.write(
            {
                "request_id": notes.pop("request_id"),
                "trace_id": format_trace_id(span.get_span_context().trace_id),
                "client": client[0] if client else "",
                "method": scope["method"],
                "path": scope["path"],
                "status": sent.status,
                "bytes_out": sent.size,
                "total_ms": round(1000 * seconds, 3),
                **notes,
            }
        )


class _Sent:
    """Passes messages on; keeps the answer's status and size."""

    def __init__(self, send: Send, headers: dict[str, str]) -> None:
        self._send = send
        self._headers = [(name.encode(), value.encode()) for name, value in headers.items()]
        self.status = 500
        self.size = 0
        self.begun = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.begun = True
            message = {**message, "headers": [*message.get("headers", []), *self._headers]}
        elif message["type"] == "http.response.body":
            self.size += len(message.get("body", b""))
        await self._send(message)


async def send_reply(reply: Reply, scope: Scope, send: Send) -> None:
    """Send a reply as the answer to a request; a refusal in the words of the route's clients."""
    if reply.status >= 400 and scope["path"].startswith(_OPENAI_PATHS):
        reply = replace(reply, body=json.dumps(openai_problem(json.loads(reply.body))).encode())
    headers = [
        (name.lower().encode(), value.encode("latin-1")) for name, value in reply.headers.items()
    ]
    if reply.status != 304:
        headers.append((b"content-length", str(len(reply.body)).encode()))
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    body = b"" if scope["method"] == "HEAD" else reply.body
    await send({"type": "http.response.body", "body": body})


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else str(uuid.uuid4())
