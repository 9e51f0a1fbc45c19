"""Trace context by its rules, and spans at a real collector."""

from __future__ import annotations

import gzip
import os
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.trace import Span

from mimray.serving.telemetry.tracing import Tracer, trace_headers
from mimray.trainers.errors import ServingError

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that says nothing of OpenTelemetry."""
    for name in os.environ:
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)
    return monkeypatch


def _traceparent(span: Span) -> tuple[str, str, bool]:
    """Trace, span, and True if it is recorded."""
    version, trace, own, flags = trace_headers(span)["traceparent"].split("-")
    assert version == "00"
    return trace, own, bool(int(flags, 16) & 1)


@pytest.mark.parametrize(
    "header", [f"00-{TRACE}-{PARENT}-01", f"cc-{TRACE}-{PARENT}-01-what-the-future-brings"]
)
def test_start__takes_a_trace_up(plain: pytest.MonkeyPatch, header: str) -> None:
    trace, own, sampled = _traceparent(Tracer().start({"traceparent": header}))
    assert (trace, sampled) == (TRACE, True)
    assert own != PARENT


@pytest.mark.parametrize(
    "header",
    [
        "", "x", f"ff-{TRACE}-{PARENT}-01", f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more", f"00-{TRACE}-{PARENT}",
    ],
)  # fmt: skip
def test_start__begins_anew_where_the_rules_are_broken(
    plain: pytest.MonkeyPatch, header: str
) -> None:
    trace, _, sampled = _traceparent(Tracer().start({"traceparent": header}))
    assert trace != TRACE
    assert not sampled  # it is recorded nowhere


def test_start__keeps_the_decision_not_to_record(plain: pytest.MonkeyPatch) -> None:
    span = Tracer().start({"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert _traceparent(span)[::2] == (TRACE, False)


@pytest.fixture
def collector(plain: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """An OTLP collector; the spans it was sent, each with its resource's attributes."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            message = ExportTraceServiceRequest.FromString(body)
            for resource in message.resource_spans:
                about = _attributes(resource.resource.attributes)
                for scope in resource.scope_spans:
                    spans.extend((span, about) for span in scope.spans)
            self.send_response(200 if self.path == "/v1/traces" else 404)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    plain.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield spans
    server.shutdown()
    server.server_close()
    thread.join()


def _attributes(attributes: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in attributes}


def test_tracer__exports_what_was_on_the_wire(collector: list[Any]) -> None:
    tracer = Tracer()
    span = tracer.start({"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=b"})
    started = time.perf_counter() - 1
    parts = [("decode", started + at, started + at + 0.2) for at in (0.1, 0.2)]
    tracer.record(trace_headers(span), parts, {"mimray.model": "m"})
    tracer.finish(span, "POST features", {"http.response.status_code": 200})
    unsampled = tracer.start({"traceparent": f"00-{TRACE}-{PARENT}-00"})
    tracer.record(trace_headers(unsampled), parts, {})
    tracer.finish(unsampled, "unsampled", {})
    tracer.close()
    found = {span.name: span for span, _ in collector}
    assert found.keys() == {"decode", "POST features"}
    server, decode = found["POST features"], found["decode"]
    assert server.trace_id.hex() == decode.trace_id.hex() == TRACE
    assert (server.span_id.hex(), server.parent_span_id.hex()) == (_traceparent(span)[1], PARENT)
    assert decode.parent_span_id.hex() == _traceparent(span)[1]
    assert server.trace_state == decode.trace_state == "a=b"
    assert decode.end_time_unix_nano - decode.start_time_unix_nano == pytest.approx(3e8, rel=1e-3)
    assert abs(server.end_time_unix_nano - time.time_ns()) < 60e9
    assert (server.kind, server.status.code) == (server.SPAN_KIND_SERVER, 0)
    assert _attributes(server.attributes) == {"http.response.status_code": 200}
    assert _attributes(decode.attributes) == {"mimray.model": "m"}
    assert {about["service.name"] for _, about in collector} == {"mimray"}


def test_tracer__a_failure_is_one(collector: list[Any], plain: pytest.MonkeyPatch) -> None:
    plain.setenv("OTEL_SERVICE_NAME", "features")
    tracer = Tracer()
    tracer.finish(tracer.start({}), "POST", {"http.response.status_code": 500})
    tracer.close()
    ((span, about),) = collector
    assert span.status.code == span.status.STATUS_CODE_ERROR
    assert _attributes(span.attributes)["error.type"] == "500"
    assert (span.parent_span_id, about["service.name"]) == (b"", "features")


def test_tracer__samples_as_the_environment_says(
    collector: list[Any], plain: pytest.MonkeyPatch
) -> None:
    plain.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    tracer = Tracer()
    begun = tracer.start({})
    assert not _traceparent(begun)[2]
    taken_up = tracer.start({"traceparent": f"00-{TRACE}-{PARENT}-01"})
    for span in (begun, taken_up):
        tracer.record(trace_headers(span), [("model", 0.0, 1.0)], {})
        tracer.finish(span, "x", {})
    tracer.close()
    assert {span.trace_id.hex() for span, _ in collector} == {TRACE}


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin", "zipkin"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "http/protobuf"),
    ],
)
def test_tracer__refuses_what_it_does_not_know(
    plain: pytest.MonkeyPatch, name: str, value: str, told: str
) -> None:
    plain.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    plain.setenv(name, value)
    with pytest.raises(ServingError, match=told):
        Tracer()
    plain.setenv("OTEL_SDK_DISABLED", "true")
    assert trace_headers(Tracer().start({})) == {}


def test_tracer__names_the_extra_that_is_missing(plain: pytest.MonkeyPatch) -> None:
    plain.setenv("OTEL_TRACES_EXPORTER", "otlp")
    plain.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ServingError) as caught:
        Tracer()
    assert "mimray[otel]" in caught.value.hint
