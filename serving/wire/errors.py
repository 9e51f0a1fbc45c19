"""Refusals between a client and the endpoint, one class for each HTTP status.

    ServingError
    ├── InvalidRequestError     400  the request breaks the protocol or asks for what is not there
    ├── UnauthorizedError       401  no key, or a wrong one
    ├── UnknownModelError       404  no such model, version or route
    ├── NotAcceptableError      406  nothing that `Accept` takes can be made
    ├── TimedOutError           408  the request itself came too slowly
    ├── ConflictError           409  the model as it is served cannot do this
    ├── TooLargeError           413  more bytes, pixels or pictures than allowed
    ├── UnsupportedMediaTypeError 415 a Content-Type or -Encoding that is not understood
    ├── UnusablePictureError    422  pictures that cannot be decoded
    ├── LaterError                   come back after `retry_after_s`
    │   ├── QuotaExceededError  429  the key's own quota is spent
    │   └── OverloadedError     503  the endpoint has no room now
    └── ModelFailureError       500  the model itself failed

The server raises them and turns them into problem JSON (RFC 9457) with the `error` member
of the Open Inference Protocol; the client turns the answer back into the same class.
`refusals.json` holds the code and the title of each status: HAProxy's launcher reads it, too, in an
isolated Python that cannot import this package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mimray.trainers.errors import ServingError

REFUSALS: dict[int, dict[str, str]] = {
    int(status): refusal
    for status, refusal in json.loads(Path(__file__).with_name("refusals.json").read_text()).items()
}
"""Code and title of the problem JSON, by HTTP status."""

_BY_STATUS: dict[int, type[EndpointError]] = {}


class EndpointError(ServingError):
    """A request that was not answered with tensors.

    Args:
        message: the mistake, naming the thing.
        hint: the cure.
        details: further members of the problem JSON.
    """

    status = 500
    title = "Request failed"

    def __init_subclass__(cls) -> None:
        """Take code and title from the table; a class without a status of its own has none."""
        if "status" in vars(cls):
            refusal = REFUSALS[cls.status]
            cls.code, cls.title = refusal["code"], refusal["title"]
            _BY_STATUS[cls.status] = cls

    def __init__(
        self, message: str, *, hint: str = "", details: dict[str, Any] | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.details = details or {}


class InvalidRequestError(EndpointError):
    """The request breaks the protocol or asks for what is not there."""

    status = 400


class UnauthorizedError(EndpointError):
    """No key, or a wrong one."""

    status = 401


class UnknownModelError(EndpointError):
    """No such model, version or route."""

    status = 404


class NotAcceptableError(EndpointError):
    """Nothing that the request's `Accept` takes can be made."""

    status = 406


class TimedOutError(EndpointError):
    """The request itself came too slowly."""

    status = 408


class ConflictError(EndpointError):
    """The model as it is served cannot do this."""

    status = 409


class TooLargeError(EndpointError):
    """More bytes, pixels or pictures than this endpoint takes in one request."""

    status = 413


class UnsupportedMediaTypeError(EndpointError):
    """A Content-Type or Content-Encoding that is not understood."""

    status = 415


class UnusablePictureError(EndpointError):
    """Pictures that cannot be decoded; `details["pictures"]` lists index, reason and message."""

    status = 422


class LaterError(EndpointError):
    """A request that may be sent again after `retry_after_s`, a whole number of seconds."""

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        details: dict[str, Any] | None = None,
        retry_after_s: int = 1,
    ) -> None:
        super().__init__(message, hint=hint, details=details)
        self.retry_after_s = retry_after_s


class QuotaExceededError(LaterError):
    """The key's own quota is spent."""

    status = 429


class OverloadedError(LaterError):
    """The queue is full, or nothing answers."""

    status = 503


class ModelFailureError(EndpointError):
    """The model itself failed."""

    status = 500


def problem(error: EndpointError) -> dict[str, Any]:
    """Problem JSON (RFC 9457) of an error, with the protocol's `error` member."""
    return {
        **error.details,
        "type": "about:blank",
        "title": error.title,
        "status": error.status,
        "code": error.code,
        "detail": str(error),
        "error": str(error),
    }


def openai_problem(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Problem JSON whose `error` is what OpenAI's clients show: message, type, parameter, code.

    Args:
        tree: problem JSON, from `problem`.

    Source: OpenAI's API reference, "Error object".
    """
    error = {"message": tree["detail"], "type": tree["code"], "param": None, "code": tree["code"]}
    return {**tree, "error": error}


def error_from_status(
    status: int, message: str, details: dict[str, Any] | None = None
) -> EndpointError:
    """The exception for an HTTP status of 400 or above.

    Args:
        status: the HTTP status.
        message: the refusal's message.
        details: further members of the problem JSON.
    """
    kind = _BY_STATUS.get(status)
    if kind is None:
        kind = ModelFailureError if status >= 500 else InvalidRequestError
    error = kind(message, details=details)
    error.status = status
    return error
