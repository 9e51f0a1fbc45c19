"""Sends a request until it is answered: attempts, pauses, and refusals as exceptions."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timezone
from email.utils import parsedate_to_datetime

from mimray.serving.client.steps import Answer, Pause, Send, Steps
from mimray.serving.wire.errors import (
    EndpointError,
    LaterError,
    ModelFailureError,
    OverloadedError,
    error_from_status,
)
from mimray.trainers.errors import ServingError

_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 10.0
# A pause may last longer than it should, and no time at all is no timeout.
_SHORTEST_S = 0.001
_RETRY_STATUSES = (429, 503)
# Members that every problem JSON has; others are details of this one.
_PROBLEM = ("type", "title", "status", "code", "detail", "error", "instance")


@dataclass(frozen=True)
class Sender:
    """Sends requests to one endpoint.

    Attributes:
        base_url: the endpoint's address.
        timeout_s: longest wait for a connection and between bytes.
        deadline_s: longest time for a request, its retries and pauses included.
        max_retries: further attempts after the first.
        clock: gives seconds, for deadlines.
        now: gives seconds since 1970, for dates in `Retry-After`.
        jitter: gives a random number between two others.
    """

    base_url: str
    timeout_s: float
    deadline_s: float
    max_retries: int
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time
    jitter: Callable[[float, float], float] = field(default_factory=lambda: random.Random().uniform)

    def __post_init__(self) -> None:
        if self.timeout_s <= 0 or self.deadline_s <= 0 or self.max_retries < 0:
            raise ServingError("times are above 0, and max_retries at least 0")

    def request(
        self,
        method: str,
        path: str,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Steps[Answer]:
        """Send until it is answered, refused for good, or attempts or time are spent.

        Every request may be sent twice, since none of them changes anything.
        """
        end = self.clock() + self.deadline_s
        attempt = 0
        while True:
            left_s = end - self.clock()
            outcome = yield self.attempt(method, path, content, headers or {}, left_s)
            if isinstance(outcome, Answer) and outcome.status == 200:
                return outcome
            wanted_s: float | None = None
            if isinstance(outcome, Answer):
                wanted_s = retry_after_s(outcome.headers.get("retry-after", ""), self.now())
                error = _error_of(outcome, wanted_s)
                final = outcome.status not in _RETRY_STATUSES
            else:
                error = OverloadedError(
                    f"{self.base_url} does not answer: {_reason(outcome.cause)}",
                    hint="is it running?",
                )
                error.__cause__ = outcome.cause
                final = False
            limit_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**attempt)
            pause_s = self.jitter(0.0, limit_s) if wanted_s is None else wanted_s
            if final or attempt == self.max_retries or self.clock() + pause_s >= end:
                raise error
            yield Pause(pause_s)
            attempt += 1

    def attempt(
        self,
        method: str,
        path: str,
        content: bytes | None,
        headers: Mapping[str, str],
        left_s: float,
    ) -> Send:
        """One attempt, for which there is `left_s`."""
        left_s = max(left_s, _SHORTEST_S)
        return Send(method, path, content, headers, min(self.timeout_s, left_s), left_s)


def retry_after_s(value: str, now_s: float) -> float | None:
    """Seconds to wait by a `Retry-After`; None where it says nothing.

    Source: RFC 9110, sec. 10.2.3.
    """
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])  # 31 years
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    zone = date.tzinfo or timezone.utc  # noqa: UP017 (Python 3.10 has no `UTC`)
    return max(0.0, date.replace(tzinfo=zone).timestamp() - now_s)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _error_of(answer: Answer, wanted_s: float | None) -> EndpointError:
    """The server's refusal as the exception it raised there."""
    if answer.status < 400:
        where = answer.headers.get("location", "")
        return ModelFailureError(
            f"status {answer.status} instead of an answer",
            hint=f"use the address it points to, {where[:100]}" if where else "",
        )
    try:
        problem = json.loads(answer.content)
        # A server of the protocol that is not ours may have `error` alone.
        message = str(problem.get("detail") or problem["error"])
        details = {key: value for key, value in problem.items() if key not in _PROBLEM}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        message = answer.content[:200].decode(errors="replace").strip() or "no reason given"
        details = {}
    error = error_from_status(answer.status, message, details)
    if wanted_s is not None and isinstance(error, LaterError):
        error.retry_after_s = math.ceil(wanted_s)
    return error
