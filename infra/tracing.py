"""OpenTelemetry traces from a request to the job that it makes and the job's layers.

Off unless an endpoint is set. Then every process sends spans to it (OTLP over HTTP): the API's for requests are made by
FastAPI itself, and a job carries the trace of the request that made it, as a W3C `traceparent`, to whichever dispatcher
runs it. Without an endpoint nothing of this is imported, and every function here does nothing.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from infra.errors import SettingsError

_NAME = "duquant"
_is_on = False


def setup_tracing(process: str, endpoint: str | None) -> None:
    """Send this process's spans to an OTLP endpoint such as `http://collector:4318`; none leaves tracing off.

    Raises:
        SettingsError: the packages of the extra `otel` are not installed.
    """
    global _is_on
    if not endpoint:
        return
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise SettingsError("DUQUANT_OTEL_ENDPOINT is set, but not installed: pip install 'duquant[otel]'") from error
    provider = TracerProvider(resource=Resource.create({"service.name": f"{_NAME}-{process}"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")))
    trace.set_tracer_provider(provider)
    _is_on = True


def flush() -> None:
    """Send what is still kept back; for the end of a process."""
    if _is_on:
        from opentelemetry import trace

        trace.get_tracer_provider().shutdown()  # type: ignore[attr-defined]  # the SDK's, which setup_tracing set


@contextmanager
def span(name: str, *, parent: str | None, attributes: Mapping[str, Any]) -> Iterator[None]:
    """Time a block that goes on with the work of another process, whose traceparent is `parent`."""
    if not _is_on:
        yield
        return
    from opentelemetry import trace
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    # A parent that is missing or malformed is ignored, as the standard says: a new trace begins.
    context = TraceContextTextMapPropagator().extract({"traceparent": parent} if parent else {}, Context())
    kind = trace.SpanKind.CONSUMER
    with trace.get_tracer(_NAME).start_as_current_span(name, context=context, kind=kind, attributes=dict(attributes)):
        yield


def annotate(attributes: Mapping[str, Any]) -> None:
    """Add facts to the span that we are in."""
    if _is_on:
        from opentelemetry import trace

        trace.get_current_span().set_attributes(dict(attributes))


def record(name: str, seconds: float, attributes: Mapping[str, Any]) -> None:
    """Add a span for work that has just ended elsewhere and took so long."""
    if not _is_on:
        return
    from opentelemetry import trace

    end = time.time_ns()
    start = end - round(seconds * 1e9)
    done = trace.get_tracer(_NAME).start_span(name, start_time=start, attributes=dict(attributes))
    done.end(end)


def current_traceparent() -> str | None:
    """Return where we are, for whoever goes on with the work; none when tracing is off."""
    if not _is_on:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent")
