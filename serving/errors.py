"""What can go wrong between a client and the endpoint, each with its HTTP status.

    ServingError
    ├── InvalidRequestError     400  the request breaks the protocol or asks for what is not there
    ├── UnauthorizedError       401  no key, or a wrong one
    ├── UnknownModelError       404  no such model, version or route
    ├── TooLargeError           413  more bytes, pixels or pictures than allowed
    ├── UnsupportedEncodingError 415 a Content-Encoding that is not understood
    ├── UnusablePictureError    422  pictures that cannot be decoded
    ├── OverloadedError         503  try again later
    └── ModelFailureError       500  the model itself failed

The server raises them and turns them into problem JSON (RFC 9457) with the `error` member
of the Open Inference Protocol; the client turns the answer back into the same class.
"""

from __future__ import annotations

from typing import Any

from trainers.errors import ServingError


class EndpointError(ServingError):
    """A request that was not answered with tensors.

    Args:
        message: what is wrong.
        hint: what to do about it.
        details: further members of the problem JSON.
    """

    status = 500
    title = "Request failed"

    def __init__(
        self, message: str, *, hint: str = "", details: dict[str, Any] | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.details = details or {}


class InvalidRequestError(EndpointError):
    """The request breaks the protocol or asks for what is not there."""

    code = "invalid_request"
    status = 400
    title = "Invalid request"


class UnauthorizedError(EndpointError):
    """No key, or a wrong one."""

    code = "unauthorized"
    status = 401
    title = "Unauthorized"


class UnknownModelError(EndpointError):
    """No such model, version or route."""

    code = "not_found"
    status = 404
    title = "Not found"


class TooLargeError(EndpointError):
    """More bytes, pixels or pictures than this endpoint takes in one request."""

    code = "too_large"
    status = 413
    title = "Too large"


class UnsupportedEncodingError(EndpointError):
    """A Content-Encoding that is not understood."""

    code = "unsupported_encoding"
    status = 415
    title = "Unsupported encoding"


class UnusablePictureError(EndpointError):
    """Pictures that cannot be decoded; `details["pictures"]` lists index, reason and message."""

    code = "unusable_picture"
    status = 422
    title = "Unusable picture"


class OverloadedError(EndpointError):
    """The queue is full, or nothing answers; `retry_after_s` says when to come back."""

    code = "overloaded"
    status = 503
    title = "Overloaded"

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


class ModelFailureError(EndpointError):
    """The model itself failed."""

    code = "model_failure"
    status = 500
    title = "Model failure"


_BY_STATUS: dict[int, type[EndpointError]] = {
    kind.status: kind
    for kind in (
        InvalidRequestError,
        UnauthorizedError,
        UnknownModelError,
        TooLargeError,
        UnsupportedEncodingError,
        UnusablePictureError,
        ModelFailureError,
        OverloadedError,
    )
}


def problem(error: EndpointError) -> dict[str, Any]:
    """The error as RFC 9457 problem JSON, with the protocol's `error` member."""
    return {
        **error.details,
        "type": "about:blank",
        "title": error.title,
        "status": error.status,
        "code": error.code,
        "detail": str(error),
        "error": str(error),
    }


def error_from_status(
    status: int, message: str, details: dict[str, Any] | None = None
) -> EndpointError:
    """The exception for an HTTP answer of 400 and above."""
    kind = _BY_STATUS.get(status)
    if kind is None:
        kind = ModelFailureError if status >= 500 else InvalidRequestError
    error = kind(message, details=details)
    error.status = status
    return error
