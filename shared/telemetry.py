"""OpenTelemetry traces: W3C context by hand-over, spans to OTLP or to a file."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

_propagator = TraceContextTextMapPropagator()

Attributes = Mapping[str, AttributeValue]


def traceparent_of(span: Span) -> str:
    """The W3C `traceparent` that makes `span` the parent at the receiver; empty for one that is no span."""
    context = span.get_span_context()
    if not context.is_valid:
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def _parent(traceparent: str) -> Context:
    return _propagator.extract({"traceparent": traceparent}) if traceparent else Context()


class Telemetry:
    """The tracer of one process."""

    def __init__(self, service: str, exporter: SpanExporter | None) -> None:
        self._provider = TracerProvider(resource=Resource.create({"service.name": f"lemix.{service}"}))
        if exporter is not None:
            self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=500))
        self._tracer = self._provider.get_tracer("lemix")
        self._root = self._tracer.start_span("process", context=Context())
        self.traceparent = traceparent_of(self._root)
        """Context of the process itself: goes with messages that belong to no request."""

    @classmethod
    def start(cls, service: str, run_dir: Path) -> Self:
        """Export by OTLP when OTEL_EXPORTER_OTLP_ENDPOINT is set, else to `run_dir`/spans.jsonl."""
        if os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            return cls(service, OTLPSpanExporter())
        return cls(service, JsonLinesExporter(run_dir / "spans.jsonl"))

    def span(
        self,
        name: str,
        *,
        traceparent: str = "",
        attributes: Attributes | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        start_wall_s: float | None = None,
    ) -> Span:
        """Start a span under `traceparent` (a new trace when empty); the caller ends it.

        `start_wall_s` back-dates it (Unix seconds).
        """
        start_ns = None if start_wall_s is None else int(start_wall_s * 1e9)
        return self._tracer.start_span(
            name, context=_parent(traceparent), attributes=attributes, kind=kind, start_time=start_ns
        )

    def close(self) -> None:
        """Export what is left."""
        self._root.end()
        self._provider.shutdown()


class NoTelemetry(Telemetry):
    """Traces nothing, and costs nothing: for simulations."""

    def __init__(self) -> None:
        self.traceparent = ""

    def span(
        self,
        name: str,
        *,
        traceparent: str = "",
        attributes: Attributes | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        start_wall_s: float | None = None,
    ) -> Span:
        return INVALID_SPAN

    def close(self) -> None:
        pass


MAX_SPANS_BYTES = 64 << 20
"""A larger file of spans becomes the older one, in the place of the one before."""


class JsonLinesExporter(SpanExporter):
    """One JSON object a line; lines of several processes may share the file (O_APPEND)."""

    def __init__(self, path: Path, *, max_bytes: int = MAX_SPANS_BYTES) -> None:
        """The file and the older one (`spans.jsonl.1`) have about `max_bytes` each at most."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._max_bytes = max_bytes

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        lines = b"".join(json.dumps(_as_dict(span)).encode() + b"\n" for span in spans)
        # Opened each time: another process may have begun a new file.
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, lines)
            is_full = os.fstat(file).st_size > self._max_bytes
        finally:
            os.close(file)
        if is_full:
            self._path.replace(self._path.with_name(f"{self._path.name}.1"))
        return SpanExportResult.SUCCESS


def _as_dict(span: ReadableSpan) -> dict[str, object]:
    context, parent = span.get_span_context(), span.parent
    assert context is not None
    return {
        "name": span.name,
        "service": span.resource.attributes["service.name"],
        "trace_id": f"{context.trace_id:032x}",
        "span_id": f"{context.span_id:016x}",
        "parent_span_id": f"{parent.span_id:016x}" if parent else None,
        "start_unix_ns": span.start_time,
        "end_unix_ns": span.end_time,
        "attributes": dict(span.attributes or {}),
        "status": span.status.status_code.name,
        "status_description": span.status.description,
        "events": [
            {
                "name": event.name,
                "unix_ns": event.timestamp,
                "attributes": dict(event.attributes or {}),
            }
            for event in span.events
        ],
    }
