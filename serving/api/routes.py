"""The routes, as ASGI applications that know nothing of Ray.

`model_app` answers below `/v2/models/<name>`, `root_app` everything else. Both read a request
into a `Call` and turn a `Reply` into the answer; who makes the one of the other is a function,
which a model's replica answers itself and the root by asking one. Both wear the same edge,
because with HAProxy in front each replica's port can be reached beside it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from mimray.serving.api.access_log import AccessLog
from mimray.serving.api.gateway import Bodies, Edge, EdgeLimits, send_reply
from mimray.serving.api.keys import KeyRing, Quota
from mimray.serving.operations.calls import Call, Reply, problem_reply
from mimray.serving.telemetry.metrics import Metrics
from mimray.serving.telemetry.tracing import Tracer
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

PAGE = Path(__file__).parents[1] / "page"
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
_KEPT_HEADERS = ("accept", "content-type", "if-none-match", HEADER_LENGTH.lower())

Ask = Callable[[str, Call], Awaitable[Reply]]
"""Answers a call to a model, by the model's name."""


@dataclass(frozen=True)
class EdgeParts:
    """What every application of a server shares.

    Attributes:
        limits: of what is read.
        keys: who may come; None for everybody.
        access_log: where requests are noted.
        tracer: where spans go.
        metrics: where refusals of no model are counted.
    """

    limits: EdgeLimits
    keys: KeyRing | None
    access_log: AccessLog
    tracer: Tracer
    metrics: Metrics

    def close(self) -> None:
        """Write and send what is left."""
        self.access_log.close()
        self.tracer.close()


def model_app(name: str, answer: Callable[[Call], Awaitable[Reply]], edge: EdgeParts) -> ASGIApp:
    """Routes of one model.

    Args:
        name: of the model.
        answer: answers calls to it.
        edge: what stands before them.
    """

    async def ask(model: str, call: Call) -> Reply:
        assert model == name
        return await answer(call)

    bodies = Bodies(edge.limits)
    return _application(_model_routes(f"/v2/models/{name}", name, ask, bodies), bodies, edge)


def root_app(
    models: Callable[[], Awaitable[Mapping[str, bool]]],
    ask: Ask,
    edge: EdgeParts,
    *,
    version: str,
    metrics: Callable[[], Awaitable[str]],
) -> ASGIApp:
    """Routes of the server as a whole, and the answer to every unknown path.

    Args:
        models: says of each model by name whether it is ready.
        ask: answers calls to models.
        edge: what stands before the routes.
        version: of this server.
        metrics: gives them in Prometheus' text format.
    """
    bodies = Bodies(edge.limits)

    async def home(request: Request) -> Response:
        if "text/html" in request.headers.get("accept", ""):
            return FileResponse(PAGE / "index.html", headers={**_PAGE_HEADERS, "Vary": "Accept"})
        states = await models() if edge.keys is None else {}
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
            facts = await _described(ask, name) if is_ready else None
            entries.append(
                {
                    "name": name,
                    "version": facts["version"] if facts else "",
                    "state": "READY" if is_ready else "UNAVAILABLE",
                    "reason": "",
                }
            )
        return JSONResponse(entries)

    async def listing(request: Request) -> Response:
        entries = []
        for name, is_ready in (await models()).items():
            facts = await _described(ask, name) if is_ready else None
            absent = {
                "id": name, "object": "model", "created": 0, "owned_by": "mimray", "ready": False
            }  # fmt: skip
            entries.append(facts or absent)
        return JSONResponse({"object": "list", "data": entries})

    async def one(request: Request) -> Response:
        name = await _known(models, request.path_params["name"])
        return _response(await ask(name, Call("describe")), request)

    async def features(request: Request) -> Response:
        return await _v1("features", request)

    async def reconstruct(request: Request) -> Response:
        return await _v1("reconstruct", request)

    async def _v1(operation: str, request: Request) -> Response:
        query = _query(request)
        name = await _known(models, query.get("model"))
        call = _call(operation, request, await bodies.read(request), query.get("version"))
        return _response(await ask(name, call), request)

    async def embeddings(request: Request) -> Response:
        from mimray.serving.operations.request_images import parse_object

        body = await bodies.read(request)
        name = await _known(models, parse_object(body).get("model"))
        return _response(await ask(name, _call("embeddings", request, body)), request)

    async def prometheus(request: Request) -> Response:
        return Response(await metrics(), media_type="text/plain; version=0.0.4")

    async def openapi(request: Request) -> Response:
        from mimray.serving.api.openapi import document

        return JSONResponse(document())

    async def other_model(model: str, call: Call) -> Reply:
        return await ask(await _known(models, model), call)

    routes = [
        Route("/", home),
        Route("/page/{path:path}", asset),
        Route("/openapi.json", openapi),
        Route("/metrics", prometheus),
        Route("/v1/models", listing),
        Route("/v1/models/{name}", one),
        Route("/v1/features", features, methods=["POST"]),
        Route("/v1/embeddings", embeddings, methods=["POST"]),
        Route("/v1/reconstruct", reconstruct, methods=["POST"]),
        Route("/v2", server),
        Route("/v2/", server),
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        Route("/v2/repository/index", index, methods=["POST"]),
        *_model_routes("/v2/models/{name}", None, other_model, bodies),
    ]
    return _application(routes, bodies, edge)


def _model_routes(prefix: str, name: str | None, ask: Ask, bodies: Bodies) -> list[Route]:
    """Routes of the Open Inference Protocol for one model, or for any whose name is in the path."""

    def described(operation: str) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            params = request.path_params
            call = _call(operation, request, b"", params.get("version"))
            return _response(await ask(name or params["name"], call), request)

        return endpoint

    async def infer(request: Request) -> Response:
        params = request.path_params
        body = await bodies.read(request)
        call = _call("infer", request, body, params.get("version"))
        return _response(await ask(name or params["name"], call), request)

    return [
        route
        for base in (prefix, prefix + "/versions/{version}")
        for route in (
            Route(base, described("metadata")),
            Route(base + "/ready", described("ready")),
            Route(base + "/config", described("config")),
            Route(base + "/stats", described("stats")),
            Route(base + "/infer", infer, methods=["POST"]),
        )
    ]


def _application(routes: list[Route], bodies: Bodies, edge: EdgeParts) -> ASGIApp:
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(
                Edge,
                bodies=bodies,
                keys=edge.keys,
                quota=Quota(),
                access_log=edge.access_log,
                tracer=edge.tracer,
                metrics=edge.metrics,
                open_paths=OPEN_PATHS,
            )
        ],
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


def _call(operation: str, request: Request, body: bytes, version: str | None = None) -> Call:
    notes = request.scope["mimray.notes"]
    notes |= {"operation": operation, "bytes_in": len(body)}
    headers = request.headers
    return Call(
        operation=operation,
        query=_query(request),
        headers={name: headers[name] for name in _KEPT_HEADERS if name in headers},
        body=body,
        version=version,
        request_id=notes["request_id"],
        traceparent=request.scope["mimray.traceparent"],
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
    import json

    reply = await ask(name, Call("describe"))
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
