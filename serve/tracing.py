"""Traces for OpenTelemetry: a span for each request, with the phases of its images below it.

Knows spans and the times of finished requests; not HTTP's semantics beyond its attributes. The
packages are imported when tracing is opened, so that a server without it needs none of them.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from sdrt.errors import UsageError
from sdrt.version import __version__

if TYPE_CHECKING:
    from concurrent.futures import Future

    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

    from sdrt.runtime.batching.request import RequestHandle

SERVICE_NAME = "sdrt"
# Of what is requested every few seconds, and of the page's files.
UNTRACED_PREFIXES = ("/health/", "/metrics", "/page/")
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT")
PHASES = ("queue", "prepare", "denoise", "decode")


@dataclass(slots=True)
class RequestSpan:
    """The span of one HTTP request; does nothing without tracing."""

    span: "Span | None" = None

    def set_response(self, route: str, status: int) -> None:
        """Name the span by the declared route, and set the outcome."""
        if self.span is None:
            return
        from opentelemetry.trace import StatusCode

        method = self.span.attributes["http.request.method"]  # type: ignore[attr-defined]
        if route != "other":
            self.span.update_name(f"{method} {route}")
            self.span.set_attribute("http.route", route)
        if status:  # none: the client was gone
            self.span.set_attribute("http.response.status_code", status)
        if status >= 500:
            self.span.set_attribute("error.type", str(status))
            self.span.set_status(StatusCode.ERROR)


@dataclass(frozen=True, slots=True)
class Tracing:
    """Records spans with a provider; without one it does nothing.

    Attributes:
        provider: Of OpenTelemetry's SDK; the caller's to shut down, by `close`.
    """

    provider: "TracerProvider | None" = field(default=None, repr=False)

    @contextmanager
    def start_request(
        self, method: str, path: str, client: str | None, headers: Mapping[str, str]
    ) -> Iterator[RequestSpan]:
        """The span of an HTTP request, below that of its `traceparent` header (W3C Trace Context),
        with the attributes of the HTTP conventions. It is current in the block.
        """
        if self.provider is None or path.startswith(UNTRACED_PREFIXES):
            yield RequestSpan()
            return
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        method = method if method in METHODS else "_OTHER"
        attributes = {
            "http.request.method": method,
            "url.path": path,
            "url.scheme": "http",
            "client.address": client,
            "user_agent.original": headers.get("user-agent"),
        }
        with self._tracer(self.provider).start_as_current_span(
            method,
            TraceContextTextMapPropagator().extract(headers),
            SpanKind.SERVER,
            {name: value for name, value in attributes.items() if value is not None},
            record_exception=False,  # its text may quote a prompt
            set_status_on_exception=False,
        ) as span:
            yield RequestSpan(span)

    @contextmanager
    def start_encode(self) -> Iterator[None]:
        """The span of writing image files, below the current span."""
        if self.provider is None:
            yield
            return
        with self._tracer(self.provider).start_as_current_span(
            "encode", record_exception=False, set_status_on_exception=False
        ):
            yield

    def follow_images(
        self, model: str, size: str, steps: int, handles: "Sequence[RequestHandle]"
    ) -> None:
        """Describe the current span by what it generates (the conventions of GenAI), and record the
        phases of each image below it once the image has ended.
        """
        if self.provider is None:
            return
        from opentelemetry.context import get_current
        from opentelemetry.trace import get_current_span

        get_current_span().set_attributes(
            {
                "gen_ai.operation.name": "generate_content",
                "gen_ai.output.type": "image",
                "gen_ai.provider.name": SERVICE_NAME,
                "gen_ai.request.model": model,
                "gen_ai.request.choice.count": len(handles),
                "gen_ai.request.seed": _as_signed(handles[0].request.seed),
                "sdrt.size": size,
                "sdrt.steps": steps,
            }
        )
        for index, handle in enumerate(handles):
            record = partial(self._record_phases, get_current(), index, handle)
            handle.future.add_done_callback(record)

    def _record_phases(
        self, parent: "Context", index: int, handle: "RequestHandle", future: "Future[Any]"
    ) -> None:
        """Spans of the phases that an image went through; the last one of a failed image failed."""
        from opentelemetry.trace import StatusCode

        assert self.provider is not None
        error = None if future.cancelled() else future.exception()
        times = handle.times
        marks = (times.submitted, times.started, times.prepared, times.denoised, times.decoded)
        offset, now = time.time() - time.monotonic(), time.monotonic()
        for phase, begin, end in zip(PHASES, marks, marks[1:], strict=False):
            if begin is None:
                return
            span = self._tracer(self.provider).start_span(
                phase,
                parent,
                attributes={"sdrt.image.index": index},
                start_time=_nanoseconds(begin + offset),
            )
            if end is None and error is not None:
                span.set_attribute("error.type", type(error).__qualname__)
                span.set_status(StatusCode.ERROR)
            if phase == "denoise":
                span.set_attribute("sdrt.evaluations", handle.evaluations_done)
            span.end(_nanoseconds((now if end is None else end) + offset))

    def _tracer(self, provider: "TracerProvider") -> Any:
        return provider.get_tracer("sdrt.serve", __version__)

    def close(self) -> None:
        """Send what is left."""
        if self.provider is not None:
            self.provider.shutdown()


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


def _as_signed(seed: int) -> int:
    """An attribute's integers have 64 bits with a sign."""
    return seed - 2**64 if seed >= 2**63 else seed


def open_tracing() -> Tracing:
    """Tracing that sends spans by OTLP over HTTP. The SDK reads its settings from the environment:
    `OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_SERVICE_NAME`, `OTEL_TRACES_SAMPLER` and others.

    Raises:
        UsageError: The packages are missing.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise UsageError(
            f"--otel requires {error.name}", hint="run `pip install 'sdrt[otel]'`"
        ) from error
    resource = Resource.create({"service.version": __version__})
    if str(resource.attributes["service.name"]).startswith("unknown_service"):  # not configured
        resource = resource.merge(Resource({"service.name": SERVICE_NAME}))
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)
