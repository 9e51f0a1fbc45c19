"""A request and its answer as values, so that one can be answered here or in another process."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from mimray.serving.wire.errors import EndpointError, LaterError, UnauthorizedError, problem

Headers = dict[str, str]


@dataclass(frozen=True)
class Call:
    """A request to one model, its body read and inflated.

    Attributes:
        operation: name of what is wanted; see `mimray.serving.operations.model_service`.
        query: the query string's parameters.
        headers: those that operations look at, by lower-case name.
        body: all of it.
        version: of the model, where the request says one.
        trace: the W3C headers of the trace it belongs to.
    """

    operation: str
    query: dict[str, str] = field(default_factory=dict)
    headers: Headers = field(default_factory=dict)
    body: bytes = b""
    version: str | None = None
    trace: Headers = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """The answer to a call.

    Attributes:
        status: of HTTP.
        headers: those that matter to whoever asked.
        body: all of it.
        notes: for the access log: pictures, phases in milliseconds, cache, version.
    """

    status: int
    headers: Headers
    body: bytes
    notes: dict[str, str | int | float] = field(default_factory=dict)


def problem_reply(error: EndpointError) -> Reply:
    """A refusal as problem JSON (RFC 9457) with the headers that belong to it."""
    headers = {"Content-Type": "application/problem+json"}
    if isinstance(error, LaterError):
        headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, UnauthorizedError):
        headers["WWW-Authenticate"] = "Bearer"
    body = json.dumps(problem(error)).encode()
    return Reply(error.status, headers, body, {"error": problem(error)["code"]})
