"""A request and its answer as values, which travel between processes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from mimray.serving.wire.errors import EndpointError, LaterError, UnauthorizedError, problem

Headers = dict[str, str]


@dataclass(frozen=True)
class Call:
    """A request to one model, its body read and inflated.

    Attributes:
        operation: the operation's name in the table of operations.
        query: the query string's parameters.
        headers: the headers that operations read, by lower-case name.
        body: the whole body.
        version: the model's version that the request names; None for none.
        trace: the W3C headers of the trace it belongs to.
        caller: name of the key that asks; empty where there are no keys.
    """

    operation: str
    query: dict[str, str] = field(default_factory=dict)
    headers: Headers = field(default_factory=dict)
    body: bytes = b""
    version: str | None = None
    trace: Headers = field(default_factory=dict)
    caller: str = ""


@dataclass(frozen=True)
class Reply:
    """The answer to a call.

    Attributes:
        status: the HTTP status.
        headers: the headers of the answer.
        body: the whole body.
        notes: members for the access log: pictures, phases in milliseconds, cache, version.
    """

    status: int
    headers: Headers
    body: bytes
    notes: dict[str, str | int | float] = field(default_factory=dict)


def problem_reply(error: EndpointError) -> Reply:
    """The reply for a refusal: problem JSON (RFC 9457) and its headers."""
    headers = {"Content-Type": "application/problem+json"}
    if isinstance(error, LaterError):
        headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, UnauthorizedError):
        headers["WWW-Authenticate"] = "Bearer"
    body = json.dumps(problem(error)).encode()
    return Reply(error.status, headers, body, {"error": problem(error)["code"]})
