"""What can go wrong between a client and the endpoint, each with its HTTP status.

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
"""

from __future__ import annotations

from typing import Any

from mimray.trainers.errors import ServingError


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


class NotAcceptableError(EndpointError):
    """Nothing that the request's `Accept` takes can be made."""

    code = "not_acceptable"
    status = 406
    title = "Not acceptable"


class TimedOutError(EndpointError):
    """The request itself came too slowly."""

    code = "timeout"
    status = 408
    title = "Timed out"


class ConflictError(EndpointError):
    """The model as it is served cannot do this."""

    code = "conflict"
    status = 409
    title = "Conflict"


class TooLargeError(EndpointError):
    """More bytes, pixels or pictures than this endpoint takes in one request."""

    code = "too_large"
    status = 413
    title = "Too large"


class UnsupportedMediaTypeError(EndpointError):
    """A Content-Type or Content-Encoding that is not understood."""

    code = "unsupported_media_type"
    status = 415
    title = "Unsupported media type"


class UnusablePictureError(EndpointError):
    """Pictures that cannot be decoded; `details["pictures"]` lists index, reason and message."""

    code = "unusable_picture"
    status = 422
    title = "Unusable picture"


class LaterError(EndpointError):
    """Not now; `retry_after_s`, a whole number, says when to come back."""

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

    code = "quota_exceeded"
    status = 429
    title = "Quota exceeded"


class OverloadedError(LaterError):
    """The queue is full, or nothing answers."""

    code = "overloaded"
    status = 503
    title = "Overloaded"


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
        NotAcceptableError,
        TimedOutError,
        ConflictError,
        TooLargeError,
        UnsupportedMediaTypeError,
        UnusablePictureError,
        QuotaExceededError,
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
