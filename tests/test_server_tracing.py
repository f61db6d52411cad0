"""OpenTelemetry spans: refused without the extra, and what a request's span says with it."""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import pytest
from fake_llm import FakeLLM
from live_server import live_server, read_all
from typer.testing import CliRunner

from hotplug.cli.main import app as cli
from hotplug.core.config import EngineConfig
from hotplug.core.errors import ConfigError, EngineDeadError
from hotplug.server import tracing
from hotplug.server.app import create_app
from hotplug.server.config import ServerConfig
from hotplug.server.serve import run

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


# --- off, or without the packages -------------------------------------------------------------------


def test_without_the_packages_the_start_is_refused_before_anything_is_loaded(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if "opentelemetry" in name else real(name, *rest)
    )
    config = ServerConfig(port=0, otlp_endpoint="http://localhost:4318")
    with pytest.raises(ConfigError, match=r"pip install 'hotplug\[otel\]'"):
        run(EngineConfig(model="no-such-model"), config)
    result = CliRunner().invoke(cli, ["serve", "no-such-model", "--otlp-endpoint", "http://localhost:4318"])
    assert result.exit_code == 2
    assert "hotplug[otel]" in result.output


@pytest.mark.parametrize("url", ["localhost:4318", "grpc://localhost:4317", "http://", "http://[", ""])
def test_an_endpoint_that_is_no_url_is_refused(url):
    with pytest.raises(ConfigError, match="otlp_endpoint"):
        ServerConfig(otlp_endpoint=url)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("http://a:4318", "http://a:4318/v1/traces"),
        ("http://a:4318/", "http://a:4318/v1/traces"),
        ("https://a/api/otlp/v1/traces", "https://a/api/otlp/v1/traces"),
    ],
)
def test_the_path_of_an_endpoint_may_be_left_out(given, found):
    assert tracing.traces_url(given) == found


def test_a_server_without_spans_imports_nothing_of_the_extra():
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_server_tracing as t;"
        "t.ask(t.create_app(t.FakeLLM(), t.ServerConfig()));"
        "assert not [m for m in sys.modules if m.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))]"
    )
    subprocess.run([sys.executable, "-c", program, str(Path(__file__).parent)], check=True, timeout=60)


# --- on ---------------------------------------------------------------------------------------------


def ask(app, path: str = "/v1/chat/completions", body: object = CHAT, **headers: str) -> httpx2.Response:
    async def send() -> httpx2.Response:
        transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, json=body, headers=headers)

    return asyncio.run(send())


class Traced:
    """An app over a fake engine, and the spans of what it was asked."""

    def __init__(self, **options) -> None:
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        self.llm = FakeLLM()
        self.exporter = InMemorySpanExporter()
        self.spans = tracing.Spans(self.exporter)
        self.app = create_app(self.llm, ServerConfig(**options), spans=self.spans)

    def span(self):
        """The only span."""
        self.spans.close()
        [span] = self.exporter.get_finished_spans()
        return span


@pytest.fixture
def traced() -> Traced:
    pytest.importorskip("opentelemetry.sdk")
    return Traced()


def test_a_request_is_a_server_span_with_what_it_asked_and_got(traced):
    body = CHAT | {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 3, "stop": ["zz"], "n": 2}
    answer = ask(traced.app, body=body).json()
    span = traced.span()
    assert span.name == "chat fake"
    assert span.kind.name == "SERVER"
    assert span.parent is None
    assert span.status.is_unset
    found = dict(span.attributes)
    assert 0 < found.pop("gen_ai.response.time_to_first_chunk") < (span.end_time - span.start_time) / 1e9
    assert found == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "hotplug",
        "gen_ai.request.model": "fake",
        "gen_ai.response.model": "fake",
        "gen_ai.request.stream": False,
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 7,
        "gen_ai.request.seed": 3,
        "gen_ai.request.stop_sequences": ("zz",),
        "gen_ai.response.id": answer["id"],
        "gen_ai.response.finish_reasons": ("length", "length"),
        "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": answer["usage"]["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": 3,
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "url.path": "/v1/chat/completions",
        "http.response.status_code": 200,
    }
    assert span.resource.attributes["service.name"] == "hotplug"


def test_a_span_is_the_child_of_the_callers(traced):
    ask(traced.app, traceparent=f"00-{TRACE}-{PARENT}-01")
    span = traced.span()
    assert format(span.context.trace_id, "032x") == TRACE
    assert format(span.parent.span_id, "016x") == PARENT


def test_a_caller_that_does_not_sample_gets_no_span(traced):
    ask(traced.app, traceparent=f"00-{TRACE}-{PARENT}-00")
    traced.spans.close()
    assert traced.exporter.get_finished_spans() == ()


def test_a_traceparent_that_is_none_begins_a_trace(traced):
    ask(traced.app, traceparent="nonsense")
    assert traced.span().parent is None


def test_several_prompts_are_one_span(traced):
    body = {"model": "fake", "prompt": ["ab", "cde"], "max_tokens": 3, "stream": True}
    assert ask(traced.app, "/v1/completions", body).status_code == 200
    span = traced.span()
    assert span.name == "text_completion fake"
    assert span.attributes["gen_ai.usage.input_tokens"] == 5
    assert span.attributes["gen_ai.usage.output_tokens"] == 6
    assert span.attributes["gen_ai.request.stream"] is True
    assert span.attributes["gen_ai.response.finish_reasons"] == ("length", "length")


def test_a_refused_request_has_a_span_with_its_status(traced):
    assert ask(traced.app, body=CHAT | {"temperature": -1}).status_code == 400
    span = traced.span()
    assert span.attributes["http.response.status_code"] == 400
    assert span.attributes["error.type"] == "400"
    assert span.status.is_unset
    assert "gen_ai.usage.output_tokens" not in span.attributes


@pytest.mark.parametrize(("tokens", "status"), [(0, 500), (2, 200)], ids=["before", "in the middle"])
def test_an_engine_that_fails_makes_an_error_of_the_span(traced, tokens, status):
    traced.llm.break_after = (tokens, EngineDeadError("gone"))
    assert ask(traced.app, body=CHAT | {"stream": True}).status_code == status
    span = traced.span()
    assert span.status.status_code.name == "ERROR"
    assert span.attributes["error.type"] == "EngineDeadError"
    assert span.attributes["gen_ai.usage.output_tokens"] == tokens
    assert span.attributes["http.response.status_code"] == status


def test_other_paths_have_no_spans(traced):
    ask(traced.app, "/tokenize", {"prompt": "hi"})
    traced.spans.close()
    assert traced.exporter.get_finished_spans() == ()


@contextmanager
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """The URL of something that takes spans, and what it got: paths and bodies."""
    got: list[tuple[str, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}", got
        server.shutdown()


def test_spans_reach_a_collector():
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    with collector() as (url, got):
        spans = tracing.connect(url)
        ask(create_app(FakeLLM(), ServerConfig(), spans=spans))
        spans.close()
    [(path, body)] = got
    assert path == "/v1/traces"
    assert b"chat fake" in body and b"gen_ai.usage.output_tokens" in body


def test_every_front_end_sends_its_spans(tiny_model):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    with collector() as (url, got):
        with live_server(tiny_model, frontends=2, otlp_endpoint=url) as server:
            for front_end in server.front_ends:
                read_all(server.post({"max_tokens": 3}, server.connect(front_end)))
            server.process.terminate()
            server.process.communicate(timeout=20)
        assert len(got) == 2
        assert all(b"text_completion tiny" in body for _, body in got)


def test_a_collector_that_is_not_there_costs_requests_nothing_and_the_end_little():
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    spans = tracing.connect("http://127.0.0.1:9")
    assert ask(create_app(FakeLLM(), ServerConfig(), spans=spans)).status_code == 200
    begin = time.monotonic()
    spans.close()
    assert time.monotonic() - begin < 10


def test_a_real_engine_tells_its_queue_time(tiny_model, tmp_path):
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from hotplug import AsyncLLM

    exporter = InMemorySpanExporter()
    spans = tracing.Spans(exporter)

    async def main() -> None:
        llm = AsyncLLM(EngineConfig(model=str(tiny_model), served_model_name="tiny", load_format="dummy",
                                    kv_cache_memory="4MiB"))  # fmt: skip
        app = create_app(llm, ServerConfig(), spans=spans)
        async with app.router.lifespan_context(app):
            await llm.wait_ready()
            transport = httpx2.ASGITransport(app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
                answer = await client.post("/v1/completions", json={"model": "tiny", "prompt": "hi", "max_tokens": 3})
                assert answer.status_code == 200, answer.text

    asyncio.run(main())
    [span] = exporter.get_finished_spans()
    assert 0 < span.attributes["hotplug.queue_time"] < span.attributes["gen_ai.response.time_to_first_chunk"]
