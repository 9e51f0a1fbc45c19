"""OpenTelemetry spans of requests and their phases, in the trace that a client's headers name.

Spans are exported if `OTEL_TRACES_EXPORTER` or an OTLP endpoint is set; the SDK reads its other
variables (sampler, headers, service name, …) itself. Without an exporter the trace is continued, so
that it reaches the client's own logs, and nothing is recorded.

Source: OpenTelemetry's semantic conventions for HTTP.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import Span, SpanKind, StatusCode, get_current_span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from mimray import __version__
from mimray.trainers.errors import ServingError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

_PROPAGATOR = TraceContextTextMapPropagator()
_STATUS = "http.response.status_code"

Phases = Sequence[tuple[str, float, float]]
"""Name, start and end on `time.perf_counter`."""


def trace_headers(span: Span) -> dict[str, str]:
    """The W3C headers that hand a span's trace on: `traceparent` and, if set, `tracestate`."""
    headers: dict[str, str] = {}
    _PROPAGATOR.inject(headers, set_span_in_context(span))
    return headers


class Tracer:
    """Starts and finishes spans.

    Raises:
        ServingError: the exporter that is set is unknown or not installed.
    """

    def __init__(self) -> None:
        self._provider = _provider(_exporter())
        self._tracer = self._provider.get_tracer("mimray")

    def start(self, headers: Mapping[str, str]) -> Span:
        """Start the span of a request.

        Args:
            headers: the request's headers, by lower-case name.
        """
        # `finish` names it; samplers see this name.
        return self._tracer.start_span("request", _PROPAGATOR.extract(headers), SpanKind.SERVER)

    def finish(self, span: Span, name: str, attributes: Mapping[str, Any]) -> None:
        """Finish the span of a request.

        Args:
            span: the span, which ends now.
            name: the request's method and operation.
            attributes: the span's attributes.
        """
        span.update_name(name)
        span.set_attributes(attributes)
        status = attributes.get(_STATUS, 0)
        if status >= 500:
            span.set_attribute("error.type", str(status))
            span.set_status(StatusCode.ERROR)
        span.end()

    def record(
        self, headers: Mapping[str, str], phases: Phases, attributes: Mapping[str, Any]
    ) -> None:
        """Record the phases of a request, whose own span may belong to another process.

        Args:
            headers: `trace_headers` of the request's span.
            phases: the phases; those of one name become one span, from the first start to the last
                end.
            attributes: the attributes of each span.
        """
        context = _PROPAGATOR.extract(headers)
        if not get_current_span(context).get_span_context().trace_flags.sampled:
            return
        merged: dict[str, tuple[float, float]] = {}
        for name, started, ended in phases:
            first, last = merged.get(name, (started, ended))
            merged[name] = min(first, started), max(last, ended)
        # `perf_counter` has no epoch of its own.
        offset_ns = time.time_ns() - time.perf_counter_ns()
        for name, (started, ended) in merged.items():
            span = self._tracer.start_span(
                name, context, attributes=attributes, start_time=offset_ns + int(started * 1e9)
            )
            span.end(offset_ns + int(ended * 1e9))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def _provider(exporter: SpanExporter | None) -> TracerProvider:
    if exporter is None:
        # Clients hear that nothing is recorded here, unless they record themselves.
        return TracerProvider(sampler=ParentBased(ALWAYS_OFF), resource=Resource.get_empty())
    resource = Resource.create({"service.version": __version__})
    if str(resource.attributes["service.name"]).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "mimray"}))
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _exporter() -> SpanExporter | None:
    """The exporter that the environment names; None for none."""
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    usual = "otlp" if any(map(_variable, endpoints)) else "none"
    wanted = _variable("OTEL_TRACES_EXPORTER") or usual
    if wanted == "none" or _variable("OTEL_SDK_DISABLED").lower() == "true":
        return None
    if wanted != "otlp":
        raise ServingError(
            f"OTEL_TRACES_EXPORTER is {wanted!r}", hint="`otlp` and `none` are understood"
        )
    protocol = (
        _variable("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
        or _variable("OTEL_EXPORTER_OTLP_PROTOCOL")
        or "http/protobuf"
    )
    if protocol != "http/protobuf":
        raise ServingError(
            f"spans are to go by {protocol!r}, and only `http/protobuf` is understood",
            hint="collectors take it on port 4318; set OTEL_EXPORTER_OTLP_PROTOCOL",
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ServingError(
            f"an OpenTelemetry exporter is set, and {error.name} is missing",
            hint="pip install 'mimray[otel]', or set OTEL_TRACES_EXPORTER=none",
        ) from error
    return OTLPSpanExporter()


def _variable(name: str) -> str:
    return os.environ.get(name, "").strip()
