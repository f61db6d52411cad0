"""How a server ends: what its clients hear, what the terminal says, and that a second signal ends it at once."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
from fake_server import connect, error, head, post, read, server_process, status
from live_server import live_server, read_until

SIGNALS = [signal.SIGTERM, signal.SIGINT]
ENDLESS = {"max_tokens": 500}


def last_event(stream: bytes) -> dict:
    """The error that a stream ends with, which has to be complete."""
    assert stream.endswith(b"\n\n\r\n0\r\n\r\n")
    assert b"[DONE]" not in stream
    return json.loads(stream.rpartition(b"data: ")[2].partition(b"\n\n")[0])["error"]


@pytest.mark.parametrize("sent", SIGNALS)
def test_a_signal_lets_requests_finish_and_says_how_many(sent):
    partly = post(max_tokens=3)
    with (server_process() as server, connect(server.port) as stream, connect(server.port) as whole,
          connect(server.port) as coming, connect(server.port) as silent):  # fmt: skip
        stream.sendall(post(stream=True, max_tokens=50))
        whole.sendall(post(max_tokens=50))
        coming.sendall(partly[:-10])
        read(stream, b"data: ")
        server.signal(sent)
        assert read(silent) == b""
        coming.sendall(partly[-10:])
        assert b"[DONE]" in read(stream)
        assert status(read(whole)) == status(read(coming)) == 200
        assert server.wait() == 0
    assert server.out.splitlines()[-2:] == ["closed", "over"]
    assert server.err == "finishing 3 requests; a second Ctrl-C or SIGTERM ends the server at once\n"


def test_a_signal_ends_an_idle_server_without_a_word():
    with server_process() as server:
        server.signal(signal.SIGTERM)
        assert server.wait(5) == 0
    assert server.err == ""


@pytest.mark.parametrize("sent", SIGNALS)
def test_a_second_signal_ends_requests_with_an_error_each(sent):
    with server_process() as server, connect(server.port) as stream, connect(server.port) as whole:
        stream.sendall(post(stream=True, **ENDLESS))
        whole.sendall(post(**ENDLESS))
        read(stream, b"data: ")
        server.signal(sent)
        assert server.process.stderr.readline().startswith("finishing 2 requests")
        server.signal(sent)
        begin = time.monotonic()
        assert "shutting down" in last_event(read(stream))["message"]
        answer = read(whole)
        assert status(answer) == 503
        assert "shutting down" in error(answer)["message"]
        assert server.wait() == 0
    assert time.monotonic() - begin < 3
    assert "closed" in server.out
    assert server.err == "2 requests were cut off by the end of the server\n"


def test_the_end_of_the_grace_ends_requests_with_an_error_each():
    with server_process(shutdown_grace=1) as server, connect(server.port) as stream, connect(server.port) as whole:
        stream.sendall(post(stream=True, **ENDLESS))
        whole.sendall(post(**ENDLESS))
        read(stream, b"data: ")
        server.signal(signal.SIGTERM)
        assert last_event(read(stream))["type"] == "service_unavailable_error"
        answer = read(whole)
        assert status(answer) == 503
        assert b"retry-after" in head(answer)
        assert server.wait() == 0
    assert "Traceback" not in server.err
    assert server.err.endswith("2 requests were cut off by the end of the server\n")


def test_a_client_that_does_not_read_does_not_hold_up_the_end():
    with server_process(shutdown_grace=0) as server, connect(server.port) as stream:
        stream.sendall(post(stream=True, n=64, logprobs=5, **ENDLESS))
        read(stream, b"data: ")
        time.sleep(1)  # what it does not read fills the buffers
        begin = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    assert time.monotonic() - begin < 5
    assert "Traceback" not in server.err


@pytest.mark.timeout(120)
def test_several_front_ends_end_as_one_does(tiny_model):
    with live_server(tiny_model, frontends=2, shutdown_grace=20) as server:
        streams = []
        for front_end in server.front_ends:
            streams.append(server.post({"max_tokens": 2000, "stream": True, "n": 4}, server.connect(front_end)))
            read_until(streams[-1], b"data: ")
        os.killpg(server.process.pid, signal.SIGINT)  # as Ctrl-C does
        assert server.process.stderr.readline().startswith("finishing 2 requests; a second Ctrl-C")
        os.killpg(server.process.pid, signal.SIGINT)
        begin = time.monotonic()
        for stream in streams:
            assert "shutting down" in last_event(read(stream))["message"]
        _, err = server.process.communicate(timeout=10)
        assert server.process.returncode == 0
    assert time.monotonic() - begin < 5
    assert "Traceback" not in err
