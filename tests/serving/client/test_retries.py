"""Retries: over the wire, and by a clock of the test's own."""

from __future__ import annotations

import socket
import threading
import time
from email.utils import formatdate
from typing import Any

import pytest

from mimray.serving.client.retries import Sender
from mimray.serving.client.steps import Answer, Failure, Pause, Send
from mimray.serving.wire.errors import (
    EndpointError,
    InvalidRequestError,
    ModelFailureError,
    OverloadedError,
    UnauthorizedError,
)
from mimray.serving.wire.oip_messages import HEADER_LENGTH, parse_request


def test_retry__after_refusals_drops_and_halves(server: Any, call: Any) -> None:
    server.script += [
        server.refuse(503, {"Retry-After": "0"}),
        server.refuse(429, {"Retry-After": "0"}),
    ]
    server.script += [server.drop, server.truncate]
    assert call("embed", [b"\x07"], "m", options={"max_retries": 4})[0, 0] == 7
    assert len(server.seen) == 5
    assert len({body for _, _, body in server.seen}) == 1


def test_retry__waits_as_long_as_asked(server: Any, call: Any) -> None:
    server.script.append(server.refuse(503, {"Retry-After": "1"}))
    started = time.monotonic()
    assert call("embed", [b"\x07"], "m")[0, 0] == 7
    assert time.monotonic() - started >= 1.0


def test_retry__never_beyond_the_deadline(server: Any, call: Any) -> None:
    server.script.append(server.refuse(503, {"Retry-After": "60"}, error="queue is full"))
    started = time.monotonic()
    with pytest.raises(OverloadedError, match="queue is full") as refused:
        call("embed", [b"a"], "m", options={"deadline_s": 50.0})
    assert refused.value.retry_after_s == 60
    assert time.monotonic() - started < 40  # it does not wait for the deadline to refuse
    assert len(server.seen) == 1


def test_retry__refusals_for_good_are_raised_at_once(server: Any, call: Any) -> None:
    for status, kind in {
        400: InvalidRequestError,
        401: UnauthorizedError,
        408: EndpointError,
        500: ModelFailureError,
        502: EndpointError,
    }.items():
        server.seen.clear()
        server.script.append(server.refuse(status, detail="d", code="c", extra=[1]))
        with pytest.raises(kind) as refused:
            call("models")
        assert (refused.value.status, refused.value.details) == (status, {"extra": [1]})
        assert len(server.seen) == 1


def test_retry__one_requests_failure_stops_the_others_pauses(server: Any, call: Any) -> None:
    def reply(handler: Any, body: bytes) -> None:
        (picture,) = parse_request(body, handler.headers[HEADER_LENGTH]).inputs[0].data
        busy = server.refuse(503, {"Retry-After": "60"})
        (server.refuse(400) if picture == b"0" else busy)(handler, body)

    server.reply = reply
    started = time.monotonic()
    options = {"batch_size": 1, "deadline_s": 120.0}
    with pytest.raises(InvalidRequestError):
        call("embed", [b"0", b"1", b"2"], "m", options=options)
    assert time.monotonic() - started < 50


def test_deadline__an_answer_that_drips_is_given_up(server: Any, call: Any) -> None:
    def drip(handler: Any, _: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        try:
            for _index in range(1000):
                handler.wfile.write(b"x")
                time.sleep(0.05)
        except OSError:
            handler.close_connection = True

    server.reply = drip
    started = time.monotonic()
    with pytest.raises(OverloadedError, match="does not answer"):
        call("models", options={"deadline_s": 0.3})
    assert time.monotonic() - started < 40  # it drips for 50 s


def test_timeout__silence_is_tried_again(server: Any, call: Any) -> None:
    released = threading.Event()
    server.script.append(lambda handler, _: released.wait(5) and None)
    try:
        assert call("embed", [b"\x07"], "m", options={"timeout_s": 0.2})[0, 0] == 7
    finally:
        released.set()
    assert len(server.seen) == 2


def test_nobody_there(call: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = call.at(f"http://127.0.0.1:{probe.getsockname()[1]}")
    assert not nobody("ready")
    assert not nobody("live")
    with pytest.raises(OverloadedError, match="does not answer: .*is it running"):
        nobody("models", options={"max_retries": 1})


class _Clock:
    """Time that passes by pauses and by what requests take, and what was asked of it."""

    def __init__(self, *outcomes: Answer | Failure, took_s: float = 0.0, **limits: Any) -> None:
        self.time_s = 1000.0
        self.pauses: list[float] = []
        self.sent: list[Send] = []
        self._outcomes = iter(outcomes)
        self._took_s = took_s
        self._sender = Sender(
            "http://x",
            **{"timeout_s": 30.0, "deadline_s": 120.0, "max_retries": 3, **limits},
            clock=lambda: self.time_s,
            now=lambda: self.time_s,
            jitter=lambda low, high: high,
        )

    def run(self) -> Answer:
        steps = self._sender.request("GET", "/")
        outcome: Any = None
        try:
            while True:
                match steps.send(outcome):
                    case Send() as send:
                        self.sent.append(send)
                        self.time_s += self._took_s
                        outcome = next(self._outcomes)
                    case Pause(seconds):
                        self.pauses.append(seconds)
                        self.time_s += seconds
                        outcome = None
        except StopIteration as end:
            answer: Answer = end.value
            return answer


def _busy(retry_after: str | None = None, status: int = 503) -> Answer:
    return Answer(status, {} if retry_after is None else {"retry-after": retry_after}, bytearray())


_DONE = Answer(200, {}, bytearray(b"{}"))
_NONE = Failure(OSError("reset"))


def test_request__pauses_grow_up_to_a_limit() -> None:
    clock = _Clock(*[_NONE, _busy()] * 4, _DONE, max_retries=9)
    assert clock.run() is _DONE
    assert clock.pauses == [0.25, 0.5, 1, 2, 4, 8, 10, 10]


def test_request__pauses_are_drawn_from_nothing_to_the_limit() -> None:
    drawn = {Sender("http://x", 30, 120, 3).jitter(0.0, 1.0) for _ in range(20)}
    assert len(drawn) > 10
    assert all(0 <= pause <= 1 for pause in drawn)


@pytest.mark.parametrize(
    ("header", "pause"),
    [
        ("7", 7),
        (" 0 ", 0),
        (formatdate(1012, usegmt=True), 12),
        (formatdate(1012), 12),
        (formatdate(900, usegmt=True), 0),
        ("-3", 0.25),
        ("soon", 0.25),
        ("1.5", 0.25),
        ("\u00b2", 0.25),
        ("", 0.25),
    ],
)
def test_request__retry_after_is_kept_to_the_second(header: str, pause: float) -> None:
    clock = _Clock(_busy(header, 429), _DONE)
    clock.run()
    assert clock.pauses == [pause]


def test_request__time_left_bounds_attempts_and_pauses() -> None:
    clock = _Clock(*[_NONE] * 9, took_s=3.0, max_retries=8, deadline_s=10.0, timeout_s=5.0)
    with pytest.raises(OverloadedError, match="reset") as refused:
        clock.run()
    assert isinstance(refused.value.__cause__, OSError)
    assert [send.left_s for send in clock.sent] == [10.0, 6.75, 3.25]
    assert [send.timeout_s for send in clock.sent] == [5.0, 5.0, 3.25]
    assert clock.time_s <= 1010.0


@pytest.mark.parametrize("header", ["10", "9" * 400, formatdate(2**33)])
def test_request__a_wait_beyond_the_deadline_is_not_begun(header: str) -> None:
    clock = _Clock(_busy(header), deadline_s=10.0)
    with pytest.raises(OverloadedError):
        clock.run()
    assert clock.pauses == []


def test_request__attempts_are_counted() -> None:
    clock = _Clock(*[_NONE] * 3, max_retries=2)
    with pytest.raises(OverloadedError):
        clock.run()
    assert len(clock.sent) == 3
