"""`hotplug bench` on a tiny model: the figures, the JSON, and the closed loop against a server."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from first_light import Figure
from typer.testing import CliRunner

from hotplug.cli.bench_engine import (
    Run,
    latency_figures,
    measure,
    random_prompts,
    speculation_figures,
    throughput_figures,
)
from hotplug.cli.bench_serve import Load, Outcome, drive, percentile, serve_figures
from hotplug.cli.main import app
from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore


def invoke(*args: str):
    return CliRunner().invoke(app, ["bench", *args])


@pytest.fixture(scope="module")
def core(tiny_model) -> EngineCore:
    return EngineCore(EngineConfig(model=str(tiny_model), load_format="dummy", kv_cache_memory="8MiB"))


# --- the engine -----------------------------------------------------------------------------------


def test_prompts_repeat_by_seed_and_stay_in_the_vocabulary():
    prompts = random_prompts(50, 3, 20, seed=1)
    assert prompts == random_prompts(50, 3, 20, seed=1) != random_prompts(50, 3, 20, seed=2)
    assert all(0 <= token < 50 for prompt in prompts for token in prompt)


def test_a_run_generates_exactly_what_was_asked(core):
    result = measure(core, random_prompts(core.vocab_size, 3, 5, seed=0), 4)
    assert (result.prompt_tokens, result.output_tokens, len(result.gaps)) == (15, 12, 9)
    assert 0 < result.ttft < result.seconds


def test_speculation_has_its_figures_and_gaps_are_those_of_tokens(tiny_model):
    core = EngineCore(EngineConfig(model=str(tiny_model), load_format="dummy", kv_cache_memory="8MiB",
                                   speculative="ngram", speculative_ngram_min=1))  # fmt: skip
    assert speculation_figures(core) == {}
    result = measure(core, [[3, 4, 5] * 8], 60)
    stats = core.stats()
    assert (result.output_tokens, len(result.gaps)) == (60, 59)
    assert stats.accepted_tokens > 0
    assert speculation_figures(core) == {
        "speculative_acceptance": stats.accepted_tokens / stats.proposed_tokens,
        "tokens_per_verification": 1 + stats.accepted_tokens / stats.verifications,
    }


def test_latency_figures_are_medians():
    runs = [
        Run(seconds=1.0 + i, ttft=0.5, gaps=[0.1, 0.1 * i, 0.1], prompt_tokens=4, output_tokens=5) for i in range(3)
    ]
    figures = latency_figures(runs)
    assert figures == pytest.approx(
        {"ttft_ms": 500, "itl_ms": 100, "decode_tokens_per_s": 4 / 1.5, "total_ms": 2000}
    )  # fmt: skip


def test_throughput_counts_output_and_prompt_apart():
    figures = throughput_figures([Run(2.0, 0.1, [], prompt_tokens=60, output_tokens=40)], num_requests=4)
    assert figures == {"output_tokens_per_s": 20, "total_tokens_per_s": 50, "requests_per_s": 2, "seconds": 2}


@pytest.mark.parametrize("benchmark", ["latency", "throughput"])
def test_json_names_the_plan_and_the_options(tiny_model, benchmark):
    result = invoke(benchmark, str(tiny_model), "--load-format", "dummy", "--input-len", "4", "--output-len", "3",
                    "--repeat", "1", "--kv-cache-memory", "8MiB", "--json", "-")  # fmt: skip
    document = json.loads(result.stdout)
    assert (document["benchmark"], document["options"]["input_len"]) == (benchmark, 4)
    assert len(document["plan_hash"]) == 16
    assert all(value > 0 for value in document["figures"].values())


def test_json_file_is_written_beside_the_table(tiny_model, tmp_path):
    file = tmp_path / "figures.json"
    result = invoke("latency", str(tiny_model), "--load-format", "dummy", "--input-len", "4", "--output-len", "2",
                    "--repeat", "1", "--kv-cache-memory", "8MiB", "--json", str(file))  # fmt: skip
    assert "ttft_ms" in result.stdout
    assert "ttft_ms" in json.loads(file.read_text())["figures"]


def test_a_prompt_beyond_the_context_is_refused(tiny_model):
    result = invoke("latency", str(tiny_model), "--load-format", "dummy", "--max-model-len", "16", "--input-len", "20")
    assert result.exit_code == 2
    assert "error:" in result.stderr


# --- a server -------------------------------------------------------------------------------------


PLAN = {"model": "m", "platform": "p", "device": {"name": "d", "arch": "a", "index": 0}, "dtype": "float32",
        "plan_hash": "0" * 16, "torch": "2"}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """The few routes that the benchmark calls; the last prompt token 7 asks for a failure."""

    def do_GET(self) -> None:
        self._send(200, json.dumps({"data": [{"id": "m"}]} if self.path == "/v1/models" else PLAN))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.seen.append(body)  # type: ignore[attr-defined]
        if body["prompt"][-1] == 7:
            self._send(429, "{}")
            return
        events = [{"choices": [{"text": "x"}], "usage": None}] * body["max_tokens"]
        events.append({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
        self._send(200, "".join(f"data: {json.dumps(e)}\n\n" for e in events) + "data: [DONE]\n\n")

    def _send(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.seen = []  # type: ignore[attr-defined]
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def url_of(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def test_the_loop_counts_tokens_gaps_and_failures(server):
    prompts = [[1], [2], [7], [3]]
    load = Load(url=url_of(server), api_key=None, model="m", prompts=prompts, output_len=3, concurrency=2)
    outcome = asyncio.run(drive(load))
    assert (outcome.completed, outcome.output_tokens, len(outcome.gaps)) == (3, 9, 6)
    assert outcome.errors == {"HTTP 429": 1}
    assert sorted(body["prompt"] for body in server.seen) == sorted(prompts)


def test_bench_serve_reports_the_servers_model_and_plan(server):
    result = invoke("serve", url_of(server) + "/v1", "--num-requests", "4", "--concurrency", "2", "--repeat", "1",
                    "--token-ids", "5", "--json", "-")  # fmt: skip
    document = json.loads(result.stdout)
    assert (document["model"], document["plan_hash"]) == ("m", "0" * 16)
    assert document["figures"]["errors"] == 0
    assert document["figures"]["output_tokens_per_s"] > 0


def test_bench_serve_without_a_server_says_so():
    result = invoke("serve", "http://127.0.0.1:9")
    assert result.exit_code == 1
    assert "no hotplug server answers" in result.stderr


def test_serve_figures_are_percentiles_in_milliseconds():
    outcome = Outcome(seconds=2.0, ttfts=[0.1, 0.2, 0.3], gaps=[0.01] * 99 + [1.0], output_tokens=10, completed=3)
    figures = serve_figures(outcome)
    assert figures["ttft_p50_ms"] == 200
    assert (figures["itl_p50_ms"], figures["itl_p99_ms"]) == (10, 1000)
    assert figures["output_tokens_per_s"] == 5


def test_a_percentile_of_nothing_is_zero():
    assert percentile([], 99) == 0.0


# --- the bars -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "at_least", "passed"), [(3.0, True, True), (2.9, True, False), (3.1, False, False)])
def test_a_figure_is_held_to_its_bar(value, at_least, passed):
    figure = Figure("gain", value, "x", 3.0, at_least)
    assert figure.passed is passed
    assert ("MISSED" in figure.row()) is not passed
