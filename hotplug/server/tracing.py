"""OpenTelemetry: a server span a request, to a collector over OTLP. The extra `otel`, imported when asked for.

Attributes are those of the semantic conventions for generative AI and for HTTP servers
(https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/); what they have no name for begins with `hotplug.`.
Prompts and answers are no part of a span. A `traceparent` header (https://www.w3.org/TR/trace-context/) makes the span
a child of the caller's; without one it begins a trace.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import hotplug
from hotplug.core.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

    from hotplug.core.client.outputs import CompletionChunk
    from hotplug.core.request import SamplingParams

_OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}
"""Paths that get a span, with the name that the conventions give to what they do."""
_SPAN = "hotplug.span"
_SHUTDOWN = 2000
"""Milliseconds that the last spans get to reach the collector."""


def require() -> None:
    """Raises ConfigError where the packages of the extra are missing."""
    wanted = ("opentelemetry", "opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
    for name in wanted:
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:  # its parent is missing
            found = None
        if found is None:
            raise ConfigError(
                "spans need OpenTelemetry, which is not installed",
                where="otlp_endpoint",
                why=f"there is no module {name}",
                hint="Install it with `pip install 'hotplug[otel]'`, or leave --otlp-endpoint out.",
            )


def traces_url(endpoint: str) -> str:
    """Where an OTLP collector takes spans; the path may be left out."""
    return endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + "/v1/traces"


def connect(endpoint: str) -> Spans:
    """Spans for the collector at `endpoint`. Raises ConfigError without the extra."""
    require()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return Spans(OTLPSpanExporter(endpoint=traces_url(endpoint)))


class Spans:
    """Makes the spans of one server. They leave in batches, from a thread of their own."""

    def __init__(self, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        name = os.environ.get("OTEL_SERVICE_NAME", "hotplug")  # the variable of every OpenTelemetry service
        resource = Resource.create({"service.name": name, "service.version": hotplug.__version__})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("hotplug", hotplug.__version__)
        self._propagator = TraceContextTextMapPropagator()

    def start(self, scope: Scope, operation: str) -> RequestSpan:
        """The span of a request, which has just come."""
        from opentelemetry.trace import SpanKind

        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        span = self._tracer.start_span(
            operation,
            context=self._propagator.extract(headers),
            kind=SpanKind.SERVER,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "hotplug",
                "http.request.method": scope["method"],
                "http.route": scope["path"],
                "url.path": scope["path"],
            },
        )
        return RequestSpan(span, operation)

    def close(self) -> None:
        """Send what is left; blocks for some seconds where nobody listens."""
        self._provider.force_flush(_SHUTDOWN)
        self._provider.shutdown()


class RequestSpan:
    """The span of one HTTP request, and what is gathered for it on the way."""

    def __init__(self, span: Span, operation: str) -> None:
        self._span = span
        self._operation = operation
        self._begin = time.monotonic()
        self._input = self._output = self._cached = self._streams = 0
        self._queued: float | None = None
        self._first: float | None = None
        self._reasons: dict[tuple[int, int], str] = {}
        """By number of the prompt and of the completion."""
        self._failure = ""

    def asked(self, model: str, params: SamplingParams, *, stream: bool) -> None:
        """What the request asks for."""
        self._span.update_name(f"{self._operation} {model}")
        given = {
            "gen_ai.request.model": model,
            "gen_ai.response.model": model,
            "gen_ai.request.stream": stream,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.choice.count": params.n if params.n != 1 else None,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.top_k": params.top_k or None,
            "gen_ai.request.frequency_penalty": params.frequency_penalty or None,
            "gen_ai.request.presence_penalty": params.presence_penalty or None,
            "gen_ai.request.seed": params.seed,
            "gen_ai.request.stop_sequences": params.stop or None,
        }
        self._set({key: value for key, value in given.items() if value is not None})

    def named(self, response_id: str) -> None:
        """The answer has its id."""
        self._set({"gen_ai.response.id": response_id})

    async def follow(
        self, chunks: AsyncGenerator[CompletionChunk, None], prompt_tokens: int
    ) -> AsyncGenerator[CompletionChunk, None]:
        """The chunks of one prompt as they are, counted."""
        number, self._streams = self._streams, self._streams + 1
        self._input += prompt_tokens
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    self._count(number, chunk)
                    yield chunk
        except Exception as error:
            self._failure = type(error).__name__
            raise

    def _count(self, number: int, chunk: CompletionChunk) -> None:
        if self._first is None and chunk.token_ids:
            self._first = time.monotonic() - self._begin
        if chunk.queued and self._queued is None:
            self._queued = chunk.queued
        if chunk.index == 0:
            self._cached += chunk.num_cached_tokens
        self._output += len(chunk.token_ids)
        if chunk.finish_reason is not None:
            self._reasons[number, chunk.index] = chunk.finish_reason

    def end(self, status: int | None) -> None:
        """The request is over; `status` is that of its answer, None where the client was gone before there was one."""
        from opentelemetry.trace import StatusCode

        found: dict[str, Any] = {}
        if self._input:
            found["gen_ai.usage.input_tokens"] = self._input
            found["gen_ai.usage.output_tokens"] = self._output
            found["gen_ai.usage.cache_read.input_tokens"] = self._cached
        if self._reasons:
            found["gen_ai.response.finish_reasons"] = [self._reasons[key] for key in sorted(self._reasons)]
        if self._first is not None:
            found["gen_ai.response.time_to_first_chunk"] = self._first
        if self._queued is not None:
            found["hotplug.queue_time"] = self._queued
        if status is not None:
            found["http.response.status_code"] = status
        failure = self._failure or (str(status) if status is not None and status >= 400 else "")
        if failure:
            found["error.type"] = failure
        if self._failure or (status is not None and status >= 500):  # of a server's span, 4xx is the client's error
            self._span.set_status(StatusCode.ERROR)
        self._set(found)
        self._span.end()

    def _set(self, attributes: dict[str, Any]) -> None:
        self._span.set_attributes(attributes)


class TracedRequests:
    """ASGI middleware: a span around every request that generates, refused ones included."""

    def __init__(self, app: ASGIApp, spans: Spans) -> None:
        self._app = app
        self._spans = spans

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        operation = _OPERATIONS.get(scope.get("path", "")) if scope["type"] == "http" else None
        if operation is None:
            await self._app(scope, receive, send)
            return
        status: int | None = None

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        scope[_SPAN] = span = self._spans.start(scope, operation)
        try:
            await self._app(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            span.end(status)


def span_of(request: Request) -> RequestSpan | None:
    """The span of a request; None where none are made."""
    return request.scope.get(_SPAN)
