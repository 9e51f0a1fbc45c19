"""Trace context by its rules, and spans at a real collector."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from serving.tracing import Tracer, continued

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    "header", [f"00-{TRACE}-{PARENT}-01", f"cc-{TRACE}-{PARENT}-01-what-the-future-brings"]
)
def test_continued__takes_a_trace_up(header: str) -> None:
    span = continued(header)
    assert (span.trace_id, span.parent_id, span.sampled) == (TRACE, PARENT, True)
    assert span.traceparent == f"00-{TRACE}-{span.span_id}-01"
    assert span.span_id != PARENT


@pytest.mark.parametrize(
    "header",
    [
        "", "x", f"ff-{TRACE}-{PARENT}-01", f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more", f"00-{TRACE}-{PARENT}",
    ],
)  # fmt: skip
def test_continued__begins_anew_where_the_rules_are_broken(header: str) -> None:
    span = continued(header)
    assert span.trace_id != TRACE
    assert len(span.trace_id) == 32
    assert span.parent_id == ""


def test_continued__keeps_the_decision_not_to_record() -> None:
    assert continued(f"00-{TRACE}-{PARENT}-00").traceparent.endswith("-00")


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """An OTLP collector; the spans it was sent."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                import gzip

                body = gzip.decompress(body)
            message = ExportTraceServiceRequest.FromString(body)
            for resource in message.resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield spans
    server.shutdown()
    server.server_close()
    thread.join()


def test_tracer__exports_what_was_on_the_wire(collector: list[Any]) -> None:
    tracer = Tracer()
    span = tracer.start(f"00-{TRACE}-{PARENT}-01")
    started = time.perf_counter() - 1
    tracer.record(
        span.traceparent, [("decode", started + 0.1, started + 0.4)], {"mimray.model": "m"}
    )
    tracer.finish(span, "POST features", started, {"http.response.status_code": 200})
    tracer.finish(tracer.start(f"00-{TRACE}-{PARENT}-00"), "unsampled", started, {})
    tracer.close()
    found = {span.name: span for span in collector}
    assert found.keys() == {"decode", "POST features"}
    server, decode = found["POST features"], found["decode"]
    assert server.trace_id.hex() == decode.trace_id.hex() == TRACE
    assert (server.span_id.hex(), server.parent_span_id.hex()) == (span.span_id, PARENT)
    assert decode.parent_span_id.hex() == span.span_id
    assert decode.end_time_unix_nano - decode.start_time_unix_nano == pytest.approx(3e8, rel=1e-3)
    assert abs(server.end_time_unix_nano - time.time_ns()) < 60e9
    assert server.attributes[0].value.int_value == 200


def test_tracer__costs_nothing_where_nobody_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    tracer = Tracer()
    tracer.finish(tracer.start(""), "x", 0.0, {})
    tracer.close()
