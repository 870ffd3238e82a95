"""Spans of OpenTelemetry: a request, and how long it resolved, queued, loaded, was answered, and waited for its first token.

Nothing of OpenTelemetry is imported unless a tracer is opened. Without one, a span costs a look at a variable of the context.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from adapterhub.serve.engines import EngineAnswer
from adapterhub.version import __version__
from adapterhub_converters.lazy_dataclass import dataclass

from .trace_context import TraceContext

_tracer: ContextVar[Any] = ContextVar("tracer", default=None)  # of the request that is being answered

_NO_SPAN = nullcontext()


@dataclass(frozen=True, slots=True)
class Tracing:
    """A tracer of OpenTelemetry.

    Attributes:
        close: Sends the last spans.
    """

    tracer: Any
    close: Callable[[], object]


def open_tracing() -> Tracing:
    """Return a tracer that sends its spans by OTLP over HTTP, as the variables `OTEL_…` configure it.

    Raises:
        ModuleNotFoundError: OpenTelemetry is not installed.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    default = Resource({"service.name": "adapterhub", "service.version": __version__})
    provider = TracerProvider(resource=default.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider.get_tracer("adapterhub", __version__), provider.shutdown)


@contextmanager
def request_span(tracing: Tracing | None, path: str, client: TraceContext | None) -> Iterator[TraceContext | None]:
    """Span a request of a client, whose span is the parent; yield the request's own, None without a trace."""
    if tracing is None:
        yield client.child() if client else None
        return
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = TraceContextTextMapPropagator().extract(client.headers()) if client else None
    token = _tracer.set(tracing.tracer)
    try:
        with tracing.tracer.start_as_current_span(f"POST {path}", context=context, kind=trace.SpanKind.SERVER):
            yield current()
    finally:
        _tracer.reset(token)


def span(name: str) -> AbstractContextManager[object]:
    """Span a part of the request."""
    tracer = _tracer.get()
    return tracer.start_as_current_span(name) if tracer is not None else _NO_SPAN


def current() -> TraceContext | None:
    """Return the innermost span; None without a tracer."""
    if _tracer.get() is None:
        return None
    from opentelemetry import trace

    context = trace.get_current_span().get_span_context()
    state = context.trace_state.to_header()
    return TraceContext(f"{context.trace_id:032x}", f"{context.span_id:016x}", int(context.trace_flags), state)


def with_first_token(answer: EngineAnswer, asked_at: int) -> EngineAnswer:
    """Return an answer with a span that ends as its first bytes arrive.

    Args:
        asked_at: When the engine was asked, in nanoseconds of Unix time.
    """
    tracer = _tracer.get()
    if tracer is None:
        return answer
    first_token = tracer.start_span("first token", start_time=asked_at)

    async def body() -> AsyncIterator[bytes]:
        async for piece in answer.body:
            first_token.end()  # a span ends once
            yield piece

    async def close() -> None:
        if first_token.is_recording():
            first_token.end()
        await answer.close()

    return replace(answer, body=body(), close=close)


def annotate(fields: Mapping[str, Any]) -> None:
    """Add the fields of a request's log line to its span."""
    if _tracer.get() is None:
        return
    from opentelemetry import trace

    request = trace.get_current_span()
    request.set_attributes({f"adapterhub.{name}": value for name, value in fields.items() if value not in ("", None)})
    request.set_attribute("http.response.status_code", fields["status"])
    if fields["status"] >= 500:
        request.set_status(trace.StatusCode.ERROR)
