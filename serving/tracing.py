"""W3C trace context, taken up and handed on; spans to OpenTelemetry where an exporter is set.

Source: W3C Trace Context, level 1, sec. 3.2; OpenTelemetry's semantic conventions for HTTP.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainers.errors import ServingError

_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 1
_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

Spans = Sequence[tuple[str, float, float]]
"""Name, start and end on `time.perf_counter`."""


@dataclass(frozen=True)
class Span:
    """One request's place in a trace.

    Attributes:
        trace_id: 32 hexadecimal digits.
        span_id: 16, of the request here.
        parent_id: 16, of whoever sent it; empty where the trace begins here.
        sampled: whether it is to be recorded.
    """

    trace_id: str
    span_id: str
    parent_id: str = ""
    sampled: bool = True

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

    Nothing of OpenTelemetry is loaded unless an exporter is set by its own environment variables.

    Raises:
        ServingError: an exporter is set, and its package is missing.
    """

    def __init__(self) -> None:
        self._exporter: Any = None
        wanted = os.environ.get("OTEL_TRACES_EXPORTER", "otlp")
        if wanted == "otlp" and any(os.environ.get(name) for name in _VARIABLES):
            self._exporter = _exporter()

    def start(self, traceparent: str) -> Span:
        """A request begins."""
        return continued(traceparent)

    def finish(self, span: Span, name: str, started: float, attributes: Mapping[str, Any]) -> None:
        """A request ended.

        Args:
            span: of the request.
            name: method and route.
            started: on `time.perf_counter`; it ends now.
            attributes: of the span.
        """
        if self._exporter is not None and span.sampled:
            self._exporter.server(span, name, started, time.perf_counter(), attributes)

    def record(self, traceparent: str, parts: Spans, attributes: Mapping[str, Any]) -> None:
        """Phases of a request whose own span is told of elsewhere, maybe in another process.

        Args:
            traceparent: of the request.
            parts: the phases.
            attributes: of each.
        """
        if self._exporter is None or not (found := _PARENT.fullmatch(traceparent)):
            return
        if int(found[4], 16) & _SAMPLED:
            self._exporter.parts(found[2], found[3], parts, attributes)

    def close(self) -> None:
        """Send what is left."""
        if self._exporter is not None:
            self._exporter.close()


class _Exporter:
    """Hands finished spans to OpenTelemetry's batch processor, ids as they were on the wire."""

    def __init__(self) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        name = os.environ.get("OTEL_SERVICE_NAME", "mimray")
        self._resource = Resource.create({"service.name": name})
        self._processor = BatchSpanProcessor(OTLPSpanExporter())

    def server(
        self, span: Span, name: str, started: float, ended: float, attributes: Mapping[str, Any]
    ) -> None:
        from opentelemetry.trace import SpanKind

        parent = self._context(span.trace_id, span.parent_id) if span.parent_id else None
        context = self._context(span.trace_id, span.span_id)
        self._export(name, context, parent, SpanKind.SERVER, started, ended, attributes)

    def parts(
        self, trace_id: str, parent_id: str, parts: Spans, attributes: Mapping[str, Any]
    ) -> None:
        from opentelemetry.trace import SpanKind

        parent = self._context(trace_id, parent_id)
        for name, started, ended in parts:
            context = self._context(trace_id, _random_id(8))
            self._export(name, context, parent, SpanKind.INTERNAL, started, ended, attributes)

    def close(self) -> None:
        self._processor.shutdown()

    def _export(
        self,
        name: str,
        context: Any,
        parent: Any,
        kind: Any,
        started: float,
        ended: float,
        attributes: Mapping[str, Any],
    ) -> None:
        from opentelemetry.sdk.trace import ReadableSpan

        # `perf_counter` has no epoch of its own.
        offset_ns = time.time_ns() - time.perf_counter_ns()
        span = ReadableSpan(
            name,
            context=context,
            parent=parent,
            kind=kind,
            resource=self._resource,
            attributes=dict(attributes),
            start_time=offset_ns + int(started * 1e9),
            end_time=offset_ns + int(ended * 1e9),
        )
        self._processor.on_end(span)

    def _context(self, trace_id: str, span_id: str) -> Any:
        from opentelemetry.trace import SpanContext, TraceFlags

        return SpanContext(
            int(trace_id, 16), int(span_id, 16), is_remote=False, trace_flags=TraceFlags(_SAMPLED)
        )


def _exporter() -> _Exporter:
    try:
        return _Exporter()
    except ImportError as error:
        raise ServingError(
            f"an OpenTelemetry exporter is set, and {error.name} is missing",
            hint="pip install 'mimray[otel]', or set OTEL_TRACES_EXPORTER=none",
        ) from error


def _random_id(size: int) -> str:
    """Of `size` bytes, not all of them zero."""
    return f"{secrets.randbits(8 * size) or 1:0{2 * size}x}"
