"""The routes, as ASGI applications that know nothing of Ray.

`model_app` answers below `/v2/models/<name>`, `root_app` everything else; both wear the same
guard, because with HAProxy in front each replica's port can be reached beside it.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.errors import (
    EndpointError,
    InvalidRequestError,
    ModelFailureError,
    OverloadedError,
    TooLargeError,
    UnauthorizedError,
    UnknownModelError,
    error_from_status,
    problem,
)
from serving.handlers import VERSION, ModelHandler
from serving.protocol import HEADER_LENGTH, inflate, parse_request

SERVER_NAME = "mimray"
OPEN_PATHS = ("/v2/health/live", "/v2/health/ready")
"""Answered without a key, for probes that cannot carry one."""


def hash_key(key: str) -> str:
    """What is kept of an API key."""
    return hashlib.sha256(key.encode()).hexdigest()


class Guard:
    """Asks for the API key, and hands on the full path whatever prefix Ray mounted us under.

    Args:
        app: what is guarded.
        key_hash: `hash_key` of the API key; None when none is needed.
    """

    def __init__(self, app: ASGIApp, *, key_hash: str | None) -> None:
        self._app = app
        self._key_hash = key_hash

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or hand on."""
        if scope["type"] == "http":
            scope = {**scope, "root_path": ""}
            if self._key_hash and scope["path"] not in OPEN_PATHS and not self._admits(scope):
                refusal = UnauthorizedError(
                    "this endpoint needs a valid API key",
                    hint="send it as `Authorization: Bearer KEY` or `X-API-Key: KEY`",
                )
                await _problem_response(refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        headers = Request(scope).headers
        scheme, _, token = headers.get("authorization", "").partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        return hmac.compare_digest(hash_key(key), self._key_hash or "")


def model_app(handler: ModelHandler, *, key_hash: str | None, max_body_bytes: int) -> ASGIApp:
    """Routes of one model.

    Args:
        handler: answers.
        key_hash: see `Guard`.
        max_body_bytes: most bytes of a request body, before and after inflating.
    """

    async def metadata(request: Request) -> Response:
        _check_version(request)
        return JSONResponse(handler.metadata())

    async def ready(request: Request) -> Response:
        _check_version(request)
        return JSONResponse({"name": handler.name, "ready": True})

    async def infer(request: Request) -> Response:
        _check_version(request)
        body = await _read_body(request, max_body_bytes)
        encoding = request.headers.get("content-encoding", "")
        body = inflate(body, encoding, max_bytes=max_body_bytes)
        answer = await handler.infer(parse_request(body, request.headers.get(HEADER_LENGTH)))
        return Response(answer.content, headers=answer.headers)

    base = f"/v2/models/{handler.name}"
    routes = [
        route
        for prefix in (base, base + "/versions/{version}")
        for route in (
            Route(prefix, metadata),
            Route(prefix + "/ready", ready),
            Route(prefix + "/infer", infer, methods=["POST"]),
        )
    ]
    return _application(routes, key_hash)


def root_app(
    models: Callable[[], Awaitable[Mapping[str, bool]]], *, version: str, key_hash: str | None
) -> ASGIApp:
    """Routes of the server as a whole, and the answer to every unknown path.

    Args:
        models: says of each model by name whether it is ready.
        version: of this server.
        key_hash: see `Guard`.
    """

    async def home(request: Request) -> Response:
        return JSONResponse(
            {
                "name": SERVER_NAME,
                "version": version,
                "protocol": "Open Inference Protocol v2",
                "models": [
                    {"name": name, "ready": ready, "url": f"/v2/models/{name}"}
                    for name, ready in (await models()).items()
                ],
            }
        )

    async def server(request: Request) -> Response:
        extensions = ["binary_tensor_data", "model_repository"]
        return JSONResponse({"name": SERVER_NAME, "version": version, "extensions": extensions})

    async def live(request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(request: Request) -> Response:
        states = await models()
        waiting = [name for name, ready in states.items() if not ready]
        if waiting:
            raise OverloadedError(f"not ready yet: {', '.join(waiting)}")
        return JSONResponse({"ready": True})

    async def index(request: Request) -> Response:
        return JSONResponse(
            [
                {
                    "name": name,
                    "version": VERSION,
                    "state": "READY" if ready else "UNAVAILABLE",
                    "reason": "",
                }
                for name, ready in (await models()).items()
            ]
        )

    async def unknown_model(request: Request) -> Response:
        name = request.path_params["name"]
        states = await models()
        if name in states:  # known, but nothing answers under its prefix
            raise OverloadedError(f"model {name!r} is not ready")
        known = ", ".join(states) or "none"
        raise UnknownModelError(f"there is no model {name!r}", hint=f"models here: {known}")

    any_method = ["GET", "POST"]
    routes = [
        Route("/", home),
        Route("/v2", server),
        Route("/v2/", server),
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        Route("/v2/repository/index", index, methods=["POST"]),
        Route("/v2/models/{name}", unknown_model, methods=any_method),
        Route("/v2/models/{name}/{rest:path}", unknown_model, methods=any_method),
    ]
    return _application(routes, key_hash)


def _application(routes: list[Route], key_hash: str | None) -> ASGIApp:
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Guard, key_hash=key_hash)],
        exception_handlers={
            EndpointError: _on_endpoint_error,
            HTTPException: _on_http_exception,
            Exception: _on_failure,
        },
    )
    app.router.redirect_slashes = False
    return app


def _problem_response(error: EndpointError) -> Response:
    headers = {}
    if isinstance(error, OverloadedError):
        headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, UnauthorizedError):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(
        problem(error), error.status, headers, media_type="application/problem+json"
    )


async def _on_endpoint_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, EndpointError)
    return _problem_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    response = _problem_response(error_from_status(error.status_code, message))
    response.headers.update(error.headers or {})
    return response


async def _on_failure(request: Request, error: Exception) -> Response:
    # Starlette raises it again after answering, so the replica's log has the traceback.
    return _problem_response(ModelFailureError(f"unexpected {type(error).__name__}"))


def _check_version(request: Request) -> None:
    version: Any = request.path_params.get("version", VERSION)
    if version != VERSION:
        raise UnknownModelError(f"there is no version {version!r}", hint=f"there is {VERSION}")


async def _read_body(request: Request, max_bytes: int) -> bytes:
    """The raw body; counted while it comes, since the stated length may be absent or a lie."""
    refusal = TooLargeError(f"the body has more than {max_bytes} bytes")
    stated = request.headers.get("content-length", "0")
    if not stated.isdigit():
        raise InvalidRequestError(f"Content-Length is {stated!r}, not a number")
    if int(stated) > max_bytes:
        raise refusal
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise refusal
        chunks.append(chunk)
    return b"".join(chunks)
