"""Many connections: descriptors are for those who speak, and what clients can cause does not fill the log."""

from __future__ import annotations

import logging
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress

import pytest
from fake_server import SlowLLM, connect, error, get, post, read, server_process, serving, status, talk
from live_server import live_server, until

from hotplug.server import connection
from hotplug.server.connections import SparseLog


def silent(stack: ExitStack, port: int, number: int) -> list[socket.socket]:
    return [stack.enter_context(connect(port)) for _ in range(number)]


def test_silent_connections_keep_nobody_out():
    with server_process(descriptors=256) as server, ExitStack() as stack:
        stream = stack.enter_context(connect(server.port))
        stream.sendall(post(stream=True, max_tokens=300))
        read(stream, b"data: ")
        others = silent(stack, server.port, 300)
        for partly in others[::2]:
            partly.send(b"GET /")
        for _ in range(5):
            begin = time.monotonic()
            assert status(talk(server.port, get("/v1/models"))) == 200
            assert time.monotonic() - begin < 1
            silent(stack, server.port, 60)
        assert b"[DONE]" in read(stream)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    assert "256 file descriptors (ulimit -n)" in server.err
    assert "to let others in" in server.err
    assert len(server.err.splitlines()) <= 3


@pytest.mark.timeout(120)
def test_silent_connections_keep_nobody_out_of_several_front_ends(tiny_model):
    with live_server(tiny_model, descriptors=256, frontends=2) as server, ExitStack() as stack:
        silent(stack, server.port, 600)
        for _ in range(4):
            begin = time.monotonic()
            assert server.complete()["usage"]["completion_tokens"] == 4
            assert time.monotonic() - begin < 5
            silent(stack, server.port, 60)


def test_a_server_full_of_requests_refuses_in_words_and_logs_it_once(caplog):
    llm = SlowLLM()
    llm.hang_after = 1
    with serving(llm) as server, ExitStack() as stack:
        server._connections.limit = 10
        for _ in range(10):
            stream = stack.enter_context(connect(server.port))
            stream.sendall(post(stream=True))
            read(stream, b"data: ")
        for _ in range(20):
            answer = talk(server.port, b"")
            assert status(answer) == 503
            assert error(answer)["code"] == "too_many_connections"
    assert [record.message.count("new ones are refused") for record in caplog.records] == [1]


def test_idle_connections_make_room_for_new_ones():
    with serving() as server, ExitStack() as stack:
        server._connections.limit = 10
        idle = silent(stack, server.port, 10)
        for each in idle:
            each.sendall(get("/health").replace(b"Connection: close\r\n", b""))
            read(each, b"}")
        assert status(talk(server.port, get("/health"))) == 200
        assert read(idle[0]) == b""


def test_unfinished_headers_of_all_connections_are_bounded(monkeypatch):
    monkeypatch.setattr(connection, "MOST_QUIET_OF_ALL", 100_000)
    with serving() as server, ExitStack() as stack:
        first, second = silent(stack, server.port, 2)
        for each in (first, second):
            each.sendall(b"GET /health HTTP/1.1\r\nA: " + b"x" * 60_000)
        refused = read(second)
        assert status(refused) == 503
        assert status(talk(server.port, get("/health"))) == 200
        first.sendall(b"\r\nConnection: close\r\n\r\n")
        assert status(read(first)) == 200
        second.close()
        assert until(lambda: server._connections.quiet_bytes == 0)


def test_a_process_without_descriptors_says_so_and_goes_on(caplog):
    held = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with serving() as server, ExitStack() as stack:
        silent(stack, server.port, 30)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        try:
            while True:
                held.append(socket.socket())
        except OSError:
            held.pop().close()  # the client's own, below
        try:
            server._connections.limit = 10_000
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline and not caplog.records:
                # The server may have taken the one that the last client gave back.
                with suppress(OSError), socket.socket() as client:
                    client.connect(("127.0.0.1", server.port))
                    time.sleep(0.1)
                time.sleep(0.01)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for each in held:
                each.close()
        assert "file descriptors" in caplog.records[0].message
        assert status(talk(server.port, get("/health"))) == 200


def test_the_limit_of_open_files_is_raised_to_what_is_allowed():
    program = (
        "import resource\nfrom hotplug.server.connections import descriptor_limit, raise_descriptor_limit\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 300))\nraise_descriptor_limit()\nprint(descriptor_limit())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "300"


def test_of_lines_of_one_kind_one_a_minute_is_logged_and_says_how_many_it_stands_for(caplog):
    now = 0.0
    log = SparseLog(lambda: now)
    with caplog.at_level(logging.WARNING):
        for i in range(100):
            log.warning("a", f"a{i}")
        log.warning("b", "b")
        now = 60.0
        log.warning("a", "a again")
    assert [r.message for r in caplog.records] == ["a0", "b", "a again (and 99 more since the last such line)"]
