"""The load of the GPU comparison: its plan, its clients against a stand-in server, and a whole dry run."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

import compare_gpu
import pytest
from peers import gpu, load
from peers.chat_load import Asked, batch, requests
from peers.gpu import Cells
from peers.gpu_settings import GPU, offline_options, server_command
from peers.records import ROOT, Run, read
from peers.servers import CannotError, served, with_path
from peers.settings import DEFAULTS, GPU_NOT_RUN, TUNED
from track import machine


@pytest.fixture
def run() -> Run:
    return Run({"cpu": "x"})


# --- the plan -------------------------------------------------------------------------------------


def test_arrivals_are_a_poisson_process_of_the_rate():
    times = [asked.at for asked in requests(50, 60, seed=3, most=8)]
    gaps = [b - a for a, b in pairwise(times)]
    assert times == sorted(times) and times[0] > 0 and times[-1] < 60
    assert len(times) == pytest.approx(3000, rel=0.1)
    assert mean(gaps) == pytest.approx(0.02, rel=0.1)
    assert sum(gap > 0.02 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.05)  # exponential: 1/e


def test_lengths_are_those_of_chats_and_follow_from_the_seed():
    plan = list(requests(50, 20, seed=3))
    assert plan == list(requests(50, 20, seed=3)) != list(requests(50, 20, seed=4))
    inputs, outputs = [len(asked.prompt) for asked in plan], [asked.outputs for asked in plan]
    assert min(inputs) >= 8 and max(inputs) <= 2000 and min(outputs) >= 8 and max(outputs) <= 1000
    assert median(inputs) == pytest.approx(148, rel=0.25) and median(outputs) == pytest.approx(181, rel=0.25)
    assert all(1000 <= token < 30_000 for asked in plan for token in asked.prompt)


def test_a_batch_keeps_its_lengths_and_changes_its_tokens_with_the_seed():
    first, second = batch(20, seed=0), batch(20, seed=1)
    assert [(len(a.prompt), a.outputs) for a in first] == [(len(a.prompt), a.outputs) for a in second]
    assert first == batch(20, seed=0) and first[0].prompt != second[0].prompt


def test_a_small_model_gets_short_requests_of_its_own_tokens():
    for asked in (*requests(50, 2, seed=1, most=6, vocabulary=40), *batch(9, 0, most=6, vocabulary=40)):
        assert len(asked.prompt) <= 6 and asked.outputs <= 6 and max(asked.prompt) < 40


# --- clients, against a server that is none ---------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """Streams as many tokens as asked for, two an event after the first; the prompt's first token asks for faults."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.seen.append((time.perf_counter(), body))  # type: ignore[attr-defined]
        fault, wanted = body["prompt"][0], body["max_tokens"]
        if fault == 1:
            self._answer(429, b'{"error": "full"}', "application/json")
            return
        events = [{"choices": [{"text": "x"}], "usage": None}] * (1 + wanted // 2)
        if fault == 2:
            events.append({"error": {"message": "the engine died"}})
        events.append({"choices": [], "usage": {"completion_tokens": wanted - (fault == 3)}})
        lines = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        self._answer(200, lines.encode(), "text/event-stream")

    def _answer(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.seen = []  # type: ignore[attr-defined]
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def url_of(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def send(server: ThreadingHTTPServer, *plan: Asked) -> load.Seen:
    return asyncio.run(load.send(url_of(server), "m", list(plan), time.perf_counter()))


def test_clients_count_tokens_and_events_and_time_each_of_them(server):
    seen = send(server, Asked(0.0, [9, 9], 8), Asked(0.05, [9, 8], 4))
    assert (seen.requests, seen.tokens, seen.events, seen.errors) == (2, 12, 8, [])
    assert len(seen.first_ms) == 2 and len(seen.gap_ms) == 6 and all(ms > 0 for ms in seen.first_ms)
    [(_, body), _] = server.seen
    assert (body["max_tokens"], body["min_tokens"], body["ignore_eos"], body["stream"]) == (8, 8, True, True)


@pytest.mark.parametrize(
    ("fault", "reason"), [(1, "status 429"), (2, "the engine died"), (3, "3 tokens in 3 events instead of 4")]
)
def test_a_request_that_does_not_end_as_it_should_is_an_error(server, fault, reason):
    seen = send(server, Asked(0.0, [fault], 4), Asked(0.0, [9], 4))
    assert len(seen.errors) == 1 and reason in seen.errors[0]
    assert (seen.tokens, len(seen.first_ms)) == (4, 1)
    with pytest.raises(RuntimeError, match=f"1 of 2 requests failed: .*{reason}"):
        load.load_figures(load.together([seen], 0.0))


def test_several_processes_send_one_plan_in_its_time(server):
    found = load.run(url_of(server), "m", rate=20, seconds=1.0, seed=5, processes=2, most=6, vocabulary=40)
    plan = list(requests(20, 1.0, 5, 6, 40))
    assert (found["requests"], found["tokens"], found["errors"]) == (len(plan), sum(a.outputs for a in plan), [])
    assert sorted(body["prompt"] for _, body in server.seen) == sorted(asked.prompt for asked in plan)
    arrived = sorted(at for at, _ in server.seen)
    assert arrived[-1] - arrived[0] >= 0.8 * (plan[-1].at - plan[0].at)
    figures = load.load_figures(found)
    assert figures["out tok/s"] == pytest.approx(found["tokens"] / found["seconds"])
    assert 0 < figures["first token p50"] <= figures["first token p99"]
    assert 1 < figures["tokens an event"] <= 2


def test_a_percentile_is_a_value_that_came():
    assert [load.percentile([5.0, 1.0, 3.0, 4.0, 2.0], share) for share in (0.0, 0.5, 0.99)] == [1.0, 3.0, 5.0]


# --- the run --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"), [("gpt9", "no model is named gpt9"), ("llama8b:decode7", "no cell is named")]
)
def test_an_unknown_model_or_cell_is_refused_by_name(text, message):
    with pytest.raises(ValueError, match=message):
        Cells.parse(text)


def test_cells_have_the_units_of_the_table_and_the_context_that_they_need():
    asked = [Asked(0.0, [1] * 30, 10), Asked(0.0, [1] * 10, 10)]
    assert gpu.figure("decode1", asked, 2.0) == (100.0, "ms/token", "lower")
    assert gpu.figure("prefill", asked, 2.0) == (20.0, "in tok/s", "higher")
    assert gpu.figure("long8", asked, 2.0) == (2.0, "s", "lower")
    assert gpu.figure("chat", asked, 2.0) == (10.0, "out tok/s", "higher")
    assert (Cells.parse("llama8b").context, Cells.parse("llama8b:long8,chat").context) == (8192, 33024)
    assert len(Cells.parse("llama3b:chat").requests("chat", 0)) == 500


@pytest.mark.parametrize("engine", gpu.ENGINES)
def test_both_engines_get_the_same_limits_and_their_own_recommended_setting(engine):
    plain, tuned = (offline_options(engine, "/m", 8192, setting, tiny=False) for setting in (DEFAULTS, TUNED))
    assert (plain["model"], plain["max_model_len"], plain["load_format"]) == ("/m", 8192, "dummy")
    assert tuned == {**plain, **GPU[engine][TUNED].offline} != plain
    command = server_command(engine, "python", "/m", 8192, TUNED, tiny=False)
    assert set(GPU[engine][TUNED].server) <= set(command)
    assert GPU[engine][TUNED].source != "-"


@pytest.mark.parametrize(
    ("arguments", "path"),
    [([], "/ours"), (["--vllm-site", "/site"], "/site"), (["--vllm-python", "/other/python"], "")],
)
def test_vllm_sees_none_of_our_packages_where_it_is_apart(monkeypatch, run, arguments, path):
    monkeypatch.setenv("PYTHONPATH", "/ours")
    bench = gpu.Bench(run, compare_gpu.parser().parse_args(arguments))
    assert bench._where("vLLM")[1]["PYTHONPATH"] == path
    assert bench._where("hotplug")[1]["PYTHONPATH"].split(":") == [str(ROOT), "/ours"]


def test_a_server_that_ends_before_it_is_ready_says_its_last_words():
    program = "import sys; print('no such device'); sys.exit(3)"
    said = "ended with 3 before it was ready: no such device"
    with pytest.raises(CannotError, match=said), served([sys.executable, "-c", program], with_path("")):
        pass


def test_without_a_gpu_the_real_run_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(machine, "gpus", list)
    monkeypatch.setattr(sys, "argv", ["compare_gpu.py", "llama3b:chat"])
    with pytest.raises(SystemExit):
        compare_gpu.main()
    assert "no GPU is here" in capsys.readouterr().err


def test_a_dry_run_measures_all_but_the_gpu_and_lists_what_is_not_here(
    tiny_model: Path, tmp_path: Path, monkeypatch, capsys
):
    """hotplug's offline API and its server with a tiny model; vLLM is named as missing in each of its places."""
    out = tmp_path / "rows.jsonl"
    arguments = ["--settings", "defaults", "--tokenizer", str(tiny_model), "--vllm-python", str(tmp_path / "python")]
    monkeypatch.setattr(sys, "argv", ["compare_gpu.py", "--dry-run", *arguments, "--out", str(out)])
    compare_gpu.main()
    rows = {(row["engine"], row["figure"]): row for row in read(out)}
    assert rows["hotplug", "chat"]["samples"][0] > 0 and len(rows["hotplug", "chat"]["plan_hash"]) == 16
    load_row = "4 requests/s, chat lengths"
    for name in ("out tok/s", "first token p50", "first token p99", "gap p99"):
        assert rows["hotplug", f"{load_row}: {name}"]["samples"][0] > 0
    for name in ("chat", f"{load_row}: out tok/s"):
        assert rows["vLLM", name]["not_measured"] and rows["vLLM", name]["peer"] == "vLLM"
    printed = capsys.readouterr().out
    assert "| tiny | chat |" in printed and f"| tiny | {load_row} | hotplug |" in printed
    assert all(absent.name in printed for absent in GPU_NOT_RUN) and "vLLM, tiny, defaults, chat" in printed
