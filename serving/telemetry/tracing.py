"""W3C trace context, taken up and handed on; spans to OpenTelemetry where an exporter is set.

`OTEL_TRACES_EXPORTER` or an OTLP endpoint turns spans on; the SDK's other variables (sampler,
headers, service name, …) mean what they mean elsewhere. Otherwise the SDK is not even imported.

Source: W3C Trace Context, level 1, sec. 3.2; OpenTelemetry's semantic conventions for HTTP.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from mimray.trainers.errors import ServingError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span as Recording

_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 1
_STATUS = "http.response.status_code"

Spans = Sequence[tuple[str, float, float]]
"""Name, start and end on `time.perf_counter`."""


@dataclass(frozen=True)
class Span:
    """One request's place in a trace.

    Attributes:
        trace_id: 32 hexadecimal digits.
        span_id: 16, of the request here.
        parent_id: 16, of whoever sent it; empty where the trace begins here.
        sampled: whether somebody records it.
        recording: what OpenTelemetry has of it, where there is an exporter.
    """

    trace_id: str
    span_id: str
    parent_id: str = ""
    sampled: bool = False
    recording: Recording | None = None

    @property
    def traceparent(self) -> str:
        """What is handed on."""
        return f"00-{self.trace_id}-{self.span_id}-{int(self.sampled):02x}"


def continued(traceparent: str) -> Span:
    """A span of its own in the trace that a header names; one that breaks the rules begins anew."""
    found = _PARENT.fullmatch(traceparent.strip())
    span_id = _random_id(8)
    if (
        not found
        or found[1] == "ff"
        or (found[1] == "00" and found[5])
        or not int(found[2], 16)
        or not int(found[3], 16)
    ):
        return Span(_random_id(16), span_id)
    return Span(found[2], span_id, found[3], bool(int(found[4], 16) & _SAMPLED))


class Tracer:
    """Starts and finishes spans.

    Raises:
        ServingError: an exporter is set that is not installed, or that we do not know.
    """

    def __init__(self) -> None:
        exporter = _exporter()
        self._provider = _provider(exporter) if exporter else None
        self._otel = self._provider.get_tracer("mimray") if self._provider else None

    def start(self, traceparent: str) -> Span:
        """A request begins."""
        span = continued(traceparent)
        if self._otel is None:
            return span
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind

        context = _below(span.trace_id, span.parent_id, span.sampled) if span.parent_id else None
        # It is named when it ends; samplers see this name.
        recording = self._otel.start_span("request", context or Context(), SpanKind.SERVER)
        own = recording.get_span_context()
        return Span(
            f"{own.trace_id:032x}",
            f"{own.span_id:016x}",
            span.parent_id,
            own.trace_flags.sampled,
            recording,
        )

    def finish(self, span: Span, name: str, started: float, attributes: Mapping[str, Any]) -> None:
        """A request ended.

        Args:
            span: of the request.
            name: method and route.
            started: on `time.perf_counter`; it ends now.
            attributes: of the span.
        """
        if span.recording is None:
            return
        from opentelemetry.trace import StatusCode

        span.recording.update_name(name)
        span.recording.set_attributes(attributes)
        status = attributes.get(_STATUS, 0)
        if status >= 500:
            span.recording.set_attribute("error.type", str(status))
            span.recording.set_status(StatusCode.ERROR)
        span.recording.end()

    def record(self, traceparent: str, parts: Spans, attributes: Mapping[str, Any]) -> None:
        """Phases of a request whose own span is told of elsewhere, maybe in another process.

        Args:
            traceparent: of the request.
            parts: the phases; those of one name become one, from the first start to the last end.
            attributes: of each.
        """
        if self._otel is None or not (found := _PARENT.fullmatch(traceparent)):
            return
        if not int(found[4], 16) & _SAMPLED:
            return
        phases: dict[str, tuple[float, float]] = {}
        for name, started, ended in parts:
            first, last = phases.get(name, (started, ended))
            phases[name] = min(first, started), max(last, ended)
        context = _below(found[2], found[3], True)
        # `perf_counter` has no epoch of its own.
        offset_ns = time.time_ns() - time.perf_counter_ns()
        for name, (started, ended) in phases.items():
            span = self._otel.start_span(
                name, context, attributes=attributes, start_time=offset_ns + int(started * 1e9)
            )
            span.end(offset_ns + int(ended * 1e9))

    def close(self) -> None:
        """Send what is left."""
        if self._provider is not None:
            self._provider.shutdown()


def _below(trace_id: str, span_id: str, sampled: bool) -> Context:
    """The context of a span that was begun elsewhere."""
    from opentelemetry.context import Context
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    parent = SpanContext(
        int(trace_id, 16),
        int(span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(_SAMPLED if sampled else 0),
    )
    return set_span_in_context(NonRecordingSpan(parent), Context())


def _provider(exporter: SpanExporter) -> TracerProvider:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.version": metadata.version("mimray")})
    if str(resource.attributes["service.name"]).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "mimray"}))
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _exporter() -> SpanExporter | None:
    """The one that the environment asks for; None where it asks for none."""
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


def _random_id(size: int) -> str:
    """Of `size` bytes, not all of them zero."""
    return f"{random.getrandbits(8 * size) or 1:0{2 * size}x}"
