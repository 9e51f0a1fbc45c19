"""The routes, as ASGI applications that know nothing of Ray.

`model_app` answers below `/v2/models/<name>`, `root_app` everything else. Both read a request
into a `Call` and turn a `Reply` into the answer. A function makes the one of the other: a model's
replica answers by itself, the root asks a replica. Both have the same gateway, because behind
HAProxy each replica's own port can be reached, too.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from mimray.serving.api.gateway import Bodies, Gateway, GatewayParts, send_reply
from mimray.serving.api.openapi import document
from mimray.serving.operations.calls import Call, Reply, problem_reply
from mimray.serving.operations.metadata import DESCRIBE
from mimray.serving.operations.operation import Operation
from mimray.serving.operations.request_images import parse_object
from mimray.serving.operations.response_formats import METADATA_HEADER
from mimray.serving.operations.table import OPERATIONS
from mimray.serving.wire.errors import (
    EndpointError,
    InvalidRequestError,
    OverloadedError,
    UnknownModelError,
    error_from_status,
)
from mimray.serving.wire.oip_messages import HEADER_LENGTH

SERVER_NAME = "mimray"
EXTENSIONS = ("binary_tensor_data", "model_repository", "model_configuration", "statistics")
OPEN_PATHS = ("/v2/health/live", "/v2/health/ready", "/", "/page/")
"""Answered without a key: for probes that cannot carry one, and the page that asks for it."""

# Resolved, as requested paths are: the package may lie behind a link.
PAGE = Path(__file__).resolve().parents[1] / "page"
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_PAGE_HEADERS = {
    "Content-Security-Policy": _PAGE_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
# Headers that pages of other origins may send, and read.
_CORS_ASKED = ("Authorization", "X-API-Key", "Content-Type", "If-None-Match", HEADER_LENGTH)
_CORS_SHOWN = ("ETag", "Retry-After", METADATA_HEADER, HEADER_LENGTH)
_KEPT_HEADERS = ("accept", "content-type", "if-none-match", HEADER_LENGTH.lower())

Endpoint = Callable[[Request], Awaitable[Response]]
Ask = Callable[[str, Call], Awaitable[Reply]]
"""Answers a call to a model, by the model's name."""


def model_app(
    name: str, answer: Callable[[Call], Awaitable[Reply]], gateway: GatewayParts
) -> ASGIApp:
    """Routes of one model.

    Args:
        name: the model's name in the URL.
        answer: answers calls to the model.
        gateway: the parts of the gateway before the routes.
    """
    bodies = Bodies(gateway.limits)

    def endpoint(operation: Operation) -> Endpoint:
        async def respond(request: Request) -> Response:
            query = _query(request)
            body = await bodies.read(request) if operation.method == "POST" else b""
            return _response(await answer(_call(operation, request, query, body)), request)

        return respond

    routes = [
        Route(path.replace("{name}", name), endpoint(operation), methods=[operation.method])
        for operation in OPERATIONS.values()
        if operation.is_below_model
        for path in operation.paths
    ]
    return _application(routes, bodies, gateway)


def root_app(
    models: Callable[[], Awaitable[Mapping[str, bool]]],
    ask: Ask,
    gateway: GatewayParts,
    *,
    version: str,
    metrics: Callable[[], Awaitable[str]],
) -> ASGIApp:
    """Routes of the server as a whole, and the answer to every unknown path.

    Args:
        models: gives the models by name, True for those that are ready.
        ask: answers a call to a model.
        gateway: the parts of the gateway before the routes.
        version: the server's version.
        metrics: gives all metrics in Prometheus' text format.
    """
    bodies = Bodies(gateway.limits)

    async def home(request: Request) -> Response:
        if "text/html" in request.headers.get("accept", ""):
            return FileResponse(PAGE / "index.html", headers={**_PAGE_HEADERS, "Vary": "Accept"})
        states = await models() if gateway.keys is None else {}
        listed = [
            {"name": name, "ready": ready, "url": f"/v2/models/{name}"}
            for name, ready in states.items()
        ]
        return JSONResponse(
            {
                "name": SERVER_NAME,
                "version": version,
                "protocol": "Open Inference Protocol v2",
                "openapi": "/openapi.json",
                "models": listed,
            },
            headers={"Vary": "Accept"},
        )

    async def asset(request: Request) -> Response:
        file = (PAGE / request.path_params["path"]).resolve()
        if not file.is_relative_to(PAGE) or not file.is_file():
            raise UnknownModelError("there is no such file")
        return FileResponse(file, headers=_PAGE_HEADERS)

    async def server(request: Request) -> Response:
        return JSONResponse(
            {"name": SERVER_NAME, "version": version, "extensions": list(EXTENSIONS)}
        )

    async def live(request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(request: Request) -> Response:
        waiting = [name for name, ready in (await models()).items() if not ready]
        if waiting:
            raise OverloadedError(f"not ready yet: {', '.join(waiting)}")
        return JSONResponse({"ready": True})

    async def index(request: Request) -> Response:
        entries = []
        for name, is_ready in (await models()).items():
            description = await _described(ask, name) if is_ready else None
            entries.append(
                {
                    "name": name,
                    "version": description["version"] if description else "",
                    "state": "READY" if is_ready else "UNAVAILABLE",
                    "reason": "",
                }
            )
        return JSONResponse(entries)

    async def listing(request: Request) -> Response:
        entries = []
        for name, is_ready in (await models()).items():
            description = await _described(ask, name) if is_ready else None
            absent = {
                "id": name, "object": "model", "created": 0, "owned_by": "mimray", "ready": False
            }  # fmt: skip
            entries.append(description or absent)
        return JSONResponse({"object": "list", "data": entries})

    def endpoint(operation: Operation) -> Endpoint:
        async def respond(request: Request) -> Response:
            query = _query(request)
            if operation.model_in == "query":  # known before its body is read
                name = await _known(models, query.get("model"))
            body = await bodies.read(request) if operation.method == "POST" else b""
            call = _call(operation, request, query, body)
            if operation.model_in == "body":
                name = await _known(models, parse_object(body).get("model"))
            elif operation.model_in == "path":
                name = await _known(models, request.path_params["name"])
            return _response(await ask(name, call), request)

        return respond

    async def prometheus(request: Request) -> Response:
        return Response(await metrics(), media_type="text/plain; version=0.0.4")

    async def openapi(request: Request) -> Response:
        return JSONResponse(document())

    routes = [
        Route("/", home),
        Route("/page/{path:path}", asset),
        Route("/openapi.json", openapi),
        Route("/metrics", prometheus),
        Route("/v1/models", listing),
        Route("/v2", server),
        Route("/v2/", server),
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        Route("/v2/repository/index", index, methods=["POST"]),
        *(
            Route(path, endpoint(operation), methods=[operation.method])
            for operation in OPERATIONS.values()
            for path in operation.paths
        ),
    ]
    return _application(routes, bodies, gateway)


def _application(routes: list[Route], bodies: Bodies, gateway: GatewayParts) -> ASGIApp:
    middleware = [Middleware(Gateway, bodies=bodies, parts=gateway, open_paths=OPEN_PATHS)]
    if gateway.cors_origins:
        # Outermost: a browser asks beforehand, and without a key.
        cors = Middleware(
            CORSMiddleware,
            allow_origins=gateway.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=_CORS_ASKED,
            expose_headers=_CORS_SHOWN,
        )
        middleware.insert(0, cors)
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={
            EndpointError: _on_endpoint_error,
            HTTPException: _on_http_exception,
        },
    )
    app.router.redirect_slashes = False
    return app


class _Reply(Response):
    """A `Reply` as Starlette sends it."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(status_code=reply.status)
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_reply(self._reply, scope, send)


def _response(reply: Reply, request: Request) -> Response:
    request.scope["mimray.notes"].update(reply.notes)
    return _Reply(reply)


def _call(operation: Operation, request: Request, query: dict[str, str], body: bytes) -> Call:
    request.scope["mimray.notes"].update(operation=operation.name, bytes_in=len(body))
    version = request.path_params.get("version")
    if operation.model_in == "query":
        version = query.get("version")
    return Call(
        operation=operation.name,
        query=query,
        headers={name: request.headers[name] for name in _KEPT_HEADERS if name in request.headers},
        body=body,
        version=version,
        trace=request.scope["mimray.trace"],
        caller=request.scope["mimray.key"].name if "mimray.key" in request.scope else "",
    )


def _query(request: Request) -> dict[str, str]:
    """Parameters of the query string; one given twice is a mistake."""
    items = request.query_params.multi_items()
    found = dict(items)
    if len(found) != len(items):
        raise InvalidRequestError("a parameter is given twice")
    return found


async def _known(models: Callable[[], Awaitable[Mapping[str, bool]]], name: Any) -> str:
    """The model meant: the one named, or the only one there is."""
    states = await models()
    known = ", ".join(states) or "none"
    if name is None and len(states) == 1:
        return next(iter(states))
    if name is None:
        raise InvalidRequestError("no model is named", hint=f"models here: {known}")
    if not isinstance(name, str) or name not in states:
        raise UnknownModelError(
            f"there is no model {str(name)[:60]!r}", hint=f"models here: {known}"
        )
    return name


async def _described(ask: Ask, name: str) -> dict[str, Any] | None:
    reply = await ask(name, Call(DESCRIBE.name))
    return json.loads(reply.body) if reply.status == 200 else None


async def _on_endpoint_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, EndpointError)
    return _response(problem_reply(error), request)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    reply = problem_reply(error_from_status(error.status_code, message))
    reply.headers.update(error.headers or {})
    return _response(reply, request)
