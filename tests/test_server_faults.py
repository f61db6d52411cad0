"""Faults of a running server, with real processes and clients: each ends in a clear state, and soon."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from live_server import CLEAR, Server, end, left, live_server, read_all, read_until, start, until

pytestmark = pytest.mark.timeout(180)
LONG = {"max_tokens": 1500, "stream": True}


@pytest.fixture(scope="module")
def served(tiny_model: Path) -> Iterator[Server]:
    """Two front ends that outlive every fault of the tests that share them."""
    with live_server(tiny_model, frontends=2) as server:
        yield server


def stream(server: Server, front_end: psutil.Process | None = None, **body: object) -> socket.socket:
    """A stream that has begun."""
    (connection,) = streams(server, [front_end], **body)
    return connection


def streams(server: Server, front_ends: Sequence[psutil.Process | None], **body: object) -> list[socket.socket]:
    """Streams that have begun, at about the same time: finding a connection of a front end may take a while."""
    connections = [server.connect(front_end) for front_end in front_ends]
    for connection in connections:
        server.post({**LONG, **body}, connection)
    for connection in connections:
        read_until(connection, b"data: ")
    return connections


def becomes_idle(server: Server) -> None:
    """The engine holds nothing any more, soon."""
    names = ("hotplug_requests_running", "hotplug_requests_waiting", "hotplug_kv_cache_usage_ratio")

    def held() -> dict[str, float]:
        found = server.metrics()
        return {name: found[name] for name in names if found[name]}

    until(lambda: not held(), CLEAR)
    assert held() == {}


# --- a front end dies -------------------------------------------------------------------------------


def test_a_killed_front_end_is_replaced_and_nobody_else_notices(served):
    victim, other = served.front_ends
    before = served.metrics()
    dropped, going_on = streams(served, [victim, other])
    victim.kill()
    killed = time.monotonic()
    assert b"[DONE]" not in read_all(dropped)
    assert time.monotonic() - killed < CLEAR
    for _ in range(8):  # some of them are for where the dead one listened
        assert served.complete()["usage"]["completion_tokens"] == 4
    assert time.monotonic() - killed < CLEAR
    assert b"[DONE]" in read_all(going_on)
    replaced = until(lambda: [p for p in served.front_ends if p.pid not in (victim.pid, other.pid)])
    assert len(replaced) == 1
    status, _ = served.get("/ready", served.connect(replaced[0]))
    assert status == 200
    becomes_idle(served)
    for front_end in served.front_ends:
        after = served.metrics(front_end)
        assert after["hotplug_frontend_restarts_total"] == before["hotplug_frontend_restarts_total"] + 1
        assert after["hotplug_requests_finished_total_length"] == before["hotplug_requests_finished_total_length"] + 9


def test_front_ends_that_die_one_after_the_other_are_all_replaced(served):
    before = served.metrics()["hotplug_frontend_restarts_total"]
    for _ in range(2):
        for front_end in served.front_ends:
            front_end.kill()
        assert until(lambda: len(served.front_ends) == 2)
        assert served.complete()["usage"]["completion_tokens"] == 4
    for _ in range(4):
        known = served.front_ends
        known[0].kill()
        assert until(lambda known=known: len(set(served.front_ends) | set(known)) == 3 and len(served.front_ends) == 2)
        assert served.complete()["usage"]["completion_tokens"] == 4
    assert until(lambda: served.metrics()["hotplug_frontend_restarts_total"] == before + 8, CLEAR)


def test_a_front_end_that_hangs_holds_up_nobody_else_and_goes_on_when_it_wakes(served):
    hanging, other = served.front_ends
    held = stream(served, hanging, max_tokens=100)
    hanging.suspend()
    try:
        begin = time.monotonic()
        for _ in range(3):
            answer = served.post({**LONG, "max_tokens": 100}, served.connect(other))
            assert b"[DONE]" in read_all(answer)
        assert time.monotonic() - begin < 10
    finally:
        hanging.resume()
    assert b"[DONE]" in read_all(held)
    assert served.front_ends == [hanging, other]


# --- figures ----------------------------------------------------------------------------------------


def test_metrics_are_the_same_whoever_answers(served):
    before = served.metrics()
    for front_end in served.front_ends:
        read_all(served.post({**LONG, "max_tokens": 10}, served.connect(front_end)))
    found = [served.metrics(front_end) for front_end in served.front_ends]
    assert found[0] == found[1]
    gained = {name: found[0][name] - before[name] for name in before}
    assert gained["hotplug_time_to_first_token_seconds_count"] == 2
    assert gained["hotplug_inter_token_latency_seconds_count"] == 18
    assert gained["hotplug_requests_finished_total_length"] == 2
    assert gained["hotplug_generation_tokens_total"] == 20


# --- clients ----------------------------------------------------------------------------------------


def test_a_client_that_does_not_read_holds_up_nobody_and_its_request_ends_with_it(served):
    [front_end, _] = served.front_ends
    read_all(served.post({**LONG, "max_tokens": 300}, served.connect(front_end)))  # what a first stream takes is taken
    memory = front_end.memory_info().rss
    others = [served.connect(front_end) for _ in range(5)]  # now: finding them may take as long as what is blocked
    with served.connect(front_end, receive_buffer=4096) as blocked:
        served.post({**LONG, "n": 16, "logprobs": 20, "max_tokens": 2000}, blocked)
        assert until(lambda: served.metrics()["hotplug_requests_running"] == 16)
        begin = time.monotonic()
        for other in others:
            assert b"[DONE]" in read_all(served.post({**LONG, "max_tokens": 20}, other))
        assert time.monotonic() - begin < 10
        assert front_end.memory_info().rss - memory < 64 << 20
        assert until(lambda: served.metrics()["hotplug_requests_running"] == 16, CLEAR)
    becomes_idle(served)


def test_a_flood_of_requests_that_are_given_up_leaves_nothing_behind(served):
    going_on = stream(served, max_tokens=400)

    def give_up(times: int) -> None:
        for i in range(times):
            connection = served.post(LONG, served.connect())
            if i % 3:
                read_until(connection, b"data: ")
            connection.close()

    threads = [threading.Thread(target=give_up, args=(50,)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert until(lambda: served.metrics()["hotplug_requests_running"] <= 1, CLEAR)
    assert b"[DONE]" in read_all(going_on)
    becomes_idle(served)
    assert served.complete()["usage"]["completion_tokens"] == 4


# --- the engine, and the end ------------------------------------------------------------------------


@pytest.mark.parametrize("frontends", [1, 2])
def test_a_killed_engine_ends_requests_with_an_error_and_the_server_with_its_reason(tiny_model, frontends):
    with live_server(tiny_model, frontends=frontends) as server:
        unread = server.connect(server.front_ends[0], receive_buffer=4096)
        server.post({**LONG, "n": 4, "logprobs": 20, "max_tokens": 2000}, unread)
        running = streams(server, server.front_ends)
        server.engine.kill()
        killed = time.monotonic()
        for each in running:
            got = read_all(each)
            assert b'"code":"engine_dead"' in got
            assert b"SIGKILL" in got
            assert b"[DONE]" not in got
        assert time.monotonic() - killed < CLEAR
        assert not says_ready(server)
        _, err = server.process.communicate(timeout=10)
        assert time.monotonic() - killed < CLEAR + 1
        assert server.process.returncode == 1
        assert "SIGKILL" in err
        unread.close()


def says_ready(server: Server) -> bool:
    try:
        return server.get("/ready")[0] == 200
    except (OSError, IndexError):  # nobody listens, or listens any more
        return False


@pytest.mark.parametrize("frontends", [1, 2])
def test_an_engine_that_cannot_start_ends_the_server_with_its_reason(tiny_model, tmp_path, frontends):
    (tmp_path / "tokenizer.json").write_text((tiny_model / "tokenizer.json").read_text())
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchForCausalLM"]}')
    process = start(tmp_path, frontends=frontends)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        end(process)
    assert out == ""
    assert "NoSuchForCausalLM" in err.splitlines()[-1]
    assert process.returncode == 1


def test_a_front_end_that_cannot_start_ends_the_server_with_its_reason(tiny_model):
    process = start(tiny_model, engine={"chat_template": "/no/such/template"}, frontends=2)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        end(process)
    assert out == ""
    assert "/no/such/template" in err.splitlines()[-1]
    assert process.returncode == 1


@pytest.mark.parametrize("to_all", [False, True], ids=["to the server", "to all processes"])
def test_a_signal_lets_running_requests_of_all_front_ends_finish(tiny_model, to_all):
    with live_server(tiny_model, frontends=2) as server:
        running = streams(server, server.front_ends, max_tokens=1000)
        processes = server.processes
        (os.killpg if to_all else os.kill)(server.process.pid, signal.SIGINT if to_all else signal.SIGTERM)
        for each in running:
            assert b"[DONE]" in read_all(each)
        out, err = server.process.communicate(timeout=10)
        assert (server.process.returncode, out) == (0, "")
        assert err == "finishing 2 requests; a second Ctrl-C or SIGTERM ends the server at once\n"
        assert not left(processes, CLEAR)


@pytest.mark.parametrize("frontends", [1, 2])
def test_a_signal_while_it_loads_ends_the_server(tiny_model, frontends):
    process = start(tiny_model, frontends=frontends)
    try:
        assert until(lambda: psutil.Process(process.pid).children())
        processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.terminate()
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err) == (0, "", "")
        assert not left(processes, CLEAR)
    finally:
        end(process)


@pytest.mark.parametrize("frontends", [1, 2])
def test_nothing_outlives_a_killed_server(tiny_model, frontends):
    with live_server(tiny_model, frontends=frontends) as server:
        processes = server.processes
        server.process.kill()
        assert not left(processes, 10)  # their memory takes a moment to be given back on a busy machine


@pytest.mark.parametrize("frontends", [1, 2])
def test_an_idle_server_leaves_the_processor_alone(tiny_model, frontends):
    with live_server(tiny_model, frontends=frontends) as server:
        server.complete()
        shares = [1.0]
        for _ in range(4):  # the best: nobody knows what a start leaves behind
            if min(shares) < 0.01:
                break
            before, begin = server.cpu_seconds(), time.monotonic()
            time.sleep(3)
            shares.append((server.cpu_seconds() - before) / (time.monotonic() - begin))
        assert min(shares) < 0.01, shares
