"""Where the time of one request went, as OpenTelemetry spans; free of cost, and of imports, unless an endpoint is set.

>>> telemetry.configure()
>>> with telemetry.span("decode", items=8): ...
>>> telemetry.record("queue", asked, began, reward="detector")

The server's own span, which continues the caller's `traceparent`, is made by FastAPI once a provider is there. Spans hold names and
counts, never a picture or a prompt.
"""

import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Tracer

Attribute = str | int | float | bool
ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
QUIET = ("/livez", "/readyz", "/metrics")  # asked every few seconds by machines: no trace is begun for them
_OFF: AbstractContextManager[None] = nullcontext()
_tracer: "Tracer | None" = None
_provider: "TracerProvider | None" = None


def configure(exporter: "SpanExporter | None" = None) -> bool:
    """Start tracing when an endpoint (OTLP over HTTP) is set, or into `exporter`; False when there is none. Once per process.

    ValueError names the packages to install. The other OTEL_ variables (sampler, service name, headers) count as the SDK says.
    """
    global _tracer, _provider
    if _tracer is not None:
        return True
    if exporter is None and (not any(map(os.environ.get, ENDPOINTS)) or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"):
        return False
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
        from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
    except ImportError as error:
        raise ValueError(f"{ENDPOINTS[0]} asks for traces: pip install 'verism[otel]', or unset it") from error

    class ButNotProbes(Sampler):
        """What `other` says, but no trace for the routes in QUIET."""

        def __init__(self, other: Sampler) -> None:
            self.other = other

        def should_sample(
            self,
            parent_context: Any,
            trace_id: int,
            name: str,
            kind: Any = None,
            attributes: Any = None,
            links: Any = None,
            trace_state: Any = None,
        ) -> SamplingResult:
            if attributes and attributes.get("url.path") in QUIET:
                return SamplingResult(Decision.DROP)
            return self.other.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)

        def get_description(self) -> str:
            return f"ButNotProbes({self.other.get_description()})"

    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "verism-reward"}
    _provider = TracerProvider(resource=Resource.create(named))
    _provider.sampler = ButNotProbes(_provider.sampler)
    _provider.add_span_processor(SimpleSpanProcessor(exporter) if exporter else BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(_provider)
    _tracer = _provider.get_tracer("verism")
    return True


def span(name: str, **attributes: Attribute) -> AbstractContextManager[Any]:
    """What happens inside the `with`, as a child of the span that is current in this task or thread."""
    return _OFF if _tracer is None else _tracer.start_as_current_span(name, attributes=attributes)


def record(name: str, began: float, ended: float, **attributes: Attribute | Sequence[str]) -> None:
    """A span told afterwards, between two readings of time.monotonic(); its parent is the span current here.

    For what another thread did on behalf of a request: call it in the request's own task, once the answer is there.
    """
    if _tracer is None:
        return
    epoch = time.time_ns() - time.monotonic_ns()
    child = _tracer.start_span(name, attributes=attributes, start_time=epoch + int(began * 1e9))
    child.end(epoch + int(ended * 1e9))


def trace_id() -> str | None:
    """The current trace as 32 hexadecimal digits, None without one: for the log line."""
    if _tracer is None:
        return None
    from opentelemetry import trace

    context = trace.get_current_span().get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else None


def flush(limit_s: float = 5.0) -> None:
    """Send what is waiting; call it off the event loop, before the process leaves."""
    if _provider is not None:
        _provider.force_flush(int(limit_s * 1000))
