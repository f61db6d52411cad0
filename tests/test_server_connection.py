"""One connection, byte by byte: what is refused before the application sees it, and that nothing of it is kept."""

from __future__ import annotations

import json
import threading
import time

import pytest
from fake_server import SlowLLM, connect, error, get, head, post, read, rss, serving, status, statuses, talk

CHUNKED = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
BODY = json.dumps({"model": "fake", "prompt": "x", "max_tokens": 5}).encode()


@pytest.fixture(scope="module")
def llm() -> SlowLLM:
    return SlowLLM()


@pytest.fixture(scope="module")
def server(llm):
    with serving(llm, api_key=("key",)) as server:
        yield server


@pytest.fixture(scope="module")
def port(server) -> int:
    return server.port


@pytest.fixture(scope="module")
def open_port() -> int:
    """Of a server that asks for no key."""
    with serving() as server:
        yield server.port


# --- headers without end ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flood",
    [
        b"GET /v1/models HTTP/1.1\r\nA: " + b"x" * 8_000_000,
        b"GET /v1/models HTTP/1.1\r\nA: " + b"x" * 65_600 + b"\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nA:" + b" " * 1_000_000,
        b"GET /v1/models HTTP/1.1\r\n" + b"a: b\r\n" * 300_000,
        b"GET /v1/models HTTP/1.1\r\n" + b"a" * 1_000_000,
        b"GET /" + b"x" * 1_000_000,
        b"\r\n" * 500_000,
    ],
    ids=["a value", "a value just too long", "spaces", "many", "a name", "the request line", "line breaks"],
)
def test_headers_without_end_are_refused_before_the_key_is_asked(port, flood):
    before = rss()
    answer = talk(port, flood)
    assert status(answer) == 431
    assert "65536 bytes" in error(answer)["message"] or "256 headers" in error(answer)["message"]
    assert rss() - before < 16 << 20


def test_headers_below_the_bound_are_taken(open_port):
    assert status(talk(open_port, get("/v1/models", "A: " + "x" * 60_000))) == 200


def test_headers_in_many_small_parts_are_taken(open_port):
    with connect(open_port) as connection:
        for byte in get("/v1/models", "A: b"):
            connection.sendall(bytes([byte]))
        assert status(read(connection)) == 200


@pytest.mark.parametrize(
    "rest",
    [b"2;" + b"x" * 1_000_000, b"2\r\n{}\r\n0\r\n" + b"a: b\r\n" * 300_000, b"2\r\n{}\r\n0\r\na: " + b"x" * 1_000_000],
    ids=["extension", "trailers", "a trailer"],
)
def test_what_frames_a_body_has_an_end_too(open_port, rest):
    answer = talk(open_port, CHUNKED + rest)
    assert status(answer) == 400
    assert "chunk extensions or trailers" in error(answer)["message"]


def test_trailers_are_no_headers(llm, port):
    trailer = b"authorization: Bearer key\r\n"
    body = b"%x\r\n%s\r\n0\r\n" % (len(BODY), BODY)
    assert status(talk(port, CHUNKED + body + trailer + b"\r\n")) == 401


# --- framing ----------------------------------------------------------------------------------------


def test_a_body_of_tiny_chunks_is_read(open_port):
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY + b" " * 10_000)
    assert status(talk(open_port, CHUNKED + chunks + b"0\r\n\r\n")) == 200


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5",
        b"Content-Length: 5\r\nContent-Length: 6",
        b"Content-Length: 5\r\nContent-Length: 5",
        b"Content-Length: 5, 5",
        b"Content-Length: -5",
        b"Content-Length: +5",
        b"Content-Length: 0x5",
        b"Content-Length: 18446744073709551616",
        b"Transfer-Encoding: xchunked",
        b"Transfer-Encoding: chunked, identity",
        b"Transfer-Encoding : chunked",
        b"A: b\r\n c",
        b"A: \x00",
    ],
)
def test_a_request_whose_framing_may_be_read_in_two_ways_is_refused(open_port, framing):
    smuggled = b"0\r\n\r\n" + get("/v1/models")
    answer = talk(open_port, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + framing + b"\r\n\r\n" + smuggled)
    assert statuses(answer) == [400]
    assert "not valid HTTP" in error(answer)["message"]


@pytest.mark.parametrize("size", [b"10000000000000000", b"zz", b"-1", b"0x5"])
def test_a_chunk_of_no_size_is_refused(open_port, size):
    assert status(talk(open_port, CHUNKED + size + b"\r\n")) == 400


def test_a_body_that_claims_to_be_too_large_is_refused_before_it_comes(open_port):
    answer = talk(open_port, get("/v1/completions", f"Content-Length: {2**63}", method="POST"))
    assert status(answer) == 413


def test_a_body_that_is_too_large_is_refused_in_words_however_it_comes(open_port):
    flood = CHUNKED + (b"100000\r\n" + b"x" * 0x100000 + b"\r\n") * 40
    answer = talk(open_port, flood)
    assert status(answer) == 413
    assert "33554432 bytes" in error(answer)["message"]


def test_bytes_behind_a_request_do_not_get_into_its_stream(open_port):
    answer = talk(open_port, post(close=False, stream=True) + b"garbage garbage\r\n\r\n")
    assert statuses(answer) == [200, 400]
    stream, _, refusal = answer.partition(b"HTTP/1.1 400")
    assert stream.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert b"not valid HTTP" in refusal


def test_pipelined_requests_are_answered_in_their_order(open_port):
    ask = get("/v1/models").replace(b"Connection: close\r\n", b"")
    between = post(close=False)
    answers = talk(open_port, ask * 2000 + between + ask * 2000 + get("/nowhere"))
    assert statuses(answers) == [200] * 4001 + [404]
    assert answers.count(b"text_completion") == 1


def test_pipelined_requests_wait_in_the_socket_while_one_is_answered(llm, port):
    ask = get("/v1/models", "Authorization: Bearer key").replace(b"Connection: close\r\n", b"")
    before = rss()
    with connect(port) as connection:
        connection.sendall(post("/v1/completions", "Authorization: Bearer key", close=False, stream=True,
                                max_tokens=400))  # fmt: skip
        read(connection, b"data: ")
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            for _ in range(200):
                connection.sendall(ask * 10_000)
    assert rss() - before < 16 << 20


def test_a_client_that_leaves_with_requests_in_line_ends_the_one_that_runs():
    llm = SlowLLM()
    llm.hang_after = 2
    with serving(llm) as server, connect(server.port) as connection:
        connection.sendall(post(close=False, stream=True) + post(close=False))
        read(connection, b"data: ")
        assert llm.hanging.wait(10)
        connection.close()
        assert llm.aborted.wait(10)


# --- other protocols --------------------------------------------------------------------------------


def test_a_stream_for_http_1_0_ends_with_the_connection_and_has_no_chunks(open_port):
    answer = talk(open_port, post(close=False, stream=True, version="1.0"))
    assert b"transfer-encoding" not in head(answer)
    assert b"connection: close" in head(answer)
    events = answer.partition(b"\r\n\r\n")[2]
    assert events.startswith(b"data: {")
    assert events.endswith(b"}\n\ndata: [DONE]\n\n")
    assert events.count(b"\n\n") == 6


def test_an_answer_for_http_1_0_has_its_length(open_port):
    answer = talk(open_port, post(close=False, version="1.0"))
    assert b"content-length" in head(answer)
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["usage"]["completion_tokens"] == 5


def test_http_1_0_has_no_chunked_bodies(open_port):
    assert status(talk(open_port, CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0") + b"0\r\n\r\n")) == 400


@pytest.mark.parametrize(
    ("sent", "expected", "words"),
    [
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "HTTP/1.1 is"),
        (b"GET / HTTP/2.0\r\n\r\n", 505, "HTTP/1.1 is"),
        (b"GET /\r\n\r\n", 505, "HTTP/1.1 is"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "http://"),
        (b"GET /\xff HTTP/1.1\r\n\r\n", 400, "url"),
        (b"GET http://x HTTP/1.1\r\n\r\n", 400, "URL"),
        (b"CONNECT x:1 HTTP/1.1\r\n\r\n", 400, "URL"),
    ],
    ids=["HTTP/2 preface", "HTTP/2 line", "HTTP/0.9", "TLS", "raw bytes", "no path", "CONNECT"],
)
def test_what_is_not_spoken_here_is_refused_in_words(open_port, sent, expected, words):
    answer = talk(open_port, sent)
    assert status(answer) == expected
    assert words in error(answer)["message"]


@pytest.mark.parametrize("path", ["/v1/models/%00", "/v1/models/%ff", "/%zz", "//v1", "/v1/models/%ed%a0%bd"])
def test_an_odd_path_is_not_found(open_port, path):
    assert status(talk(open_port, get(path))) == 404


def test_an_absolute_target_is_its_path(open_port):
    assert status(talk(open_port, get("http://elsewhere/v1/models"))) == 200


@pytest.mark.parametrize("protocol", ["h2c", "websocket"])
def test_a_request_that_offers_another_protocol_keeps_its_body(open_port, protocol):
    upgrade = (f"Upgrade: {protocol}", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABkAAQAAP__")
    answers = talk(open_port, post("/v1/completions", *upgrade, close=False) + get("/v1/models", *upgrade[:2]))
    assert statuses(answers)[0] == 200
    assert b'"completion_tokens":5' in answers
    chunked = CHUNKED.replace(b"Connection: close", "\r\n".join(upgrade).encode())
    answers = talk(open_port, chunked + b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY) + get("/v1/models"))
    assert statuses(answers) == [200, 200]


def test_a_client_that_expects_to_be_told_to_go_on_is(open_port):
    request = post("/v1/completions", "Expect: 100-continue")
    at = request.index(b"\r\n\r\n") + 4
    with connect(open_port) as connection:
        connection.sendall(request[:at])
        assert read(connection, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(request[at:])
        assert status(read(connection)) == 200


def test_a_body_that_was_not_asked_for_is_not_waited_for(port):
    request = post("/v1/completions", "Expect: 100-continue", close=False)
    assert status(talk(port, request[: request.index(b"\r\n\r\n") + 4])) == 401


@pytest.mark.parametrize("key", [b"\xff\xfe", b"\xc3\xa9", b"k\x80y"])
def test_a_key_of_any_bytes_is_a_wrong_key(port, key):
    assert status(talk(port, get("/v1/models").replace(b"Host: x", b"Authorization: Bearer " + key))) == 401


# --- time -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hasty() -> int:
    """The port of a server that waits for a second."""
    with serving(read_timeout=1) as server:
        yield server.port


@pytest.mark.parametrize("sent", [b"", b"\r\n\r\n"], ids=["nothing", "line breaks"])
def test_a_connection_without_a_request_is_closed(hasty, sent):
    begin = time.monotonic()
    assert talk(hasty, sent) == b""
    assert 0.9 < time.monotonic() - begin < 8


def test_headers_that_trickle_in_are_given_up(hasty):
    with connect(hasty) as connection:
        done = threading.Event()

        def trickle() -> None:
            while not done.wait(0.1):
                connection.send(b"a")

        connection.sendall(b"GET /v1/models HTTP/1.1\r\n")
        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            answer = read(connection, b"}}")
        finally:
            done.set()
            thread.join()
    assert status(answer) == 408


@pytest.mark.parametrize("request_", [post()[:-5], CHUNKED, CHUNKED + b"5\r\n{"], ids=["length", "chunks", "a chunk"])
def test_a_body_that_stalls_is_given_up(hasty, request_):
    answer = talk(hasty, request_)
    assert status(answer) == 408
    assert "body" in error(answer)["message"]


def test_a_body_that_trickles_in_is_given_up(hasty):
    with connect(hasty) as connection:
        done = threading.Event()

        def trickle() -> None:
            while not done.wait(0.1):
                connection.send(b" ")

        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n" + b"Content-Length: 1000000\r\n\r\n"
        )
        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            answer = read(connection, b"}}")
        finally:
            done.set()
            thread.join()
    assert status(answer) == 408


def test_an_answer_takes_as_long_as_it_takes_and_so_does_its_reader(hasty):
    with connect(hasty) as slow, connect(hasty) as whole, connect(hasty) as rest:
        slow.sendall(post(stream=True, max_tokens=300))
        whole.sendall(post(max_tokens=300))
        rest.sendall(get("/v1/models").replace(b"Connection: close\r\n", b"") + b"GET /v1")
        read(rest, b"]}")
        assert status(read(whole)) == 200
        assert b"[DONE]" in read(slow)
        assert status(read(rest)) == 408  # its next request


def test_a_connection_rests_between_requests_for_longer(hasty):
    ask = get("/v1/models").replace(b"Connection: close\r\n", b"")
    with connect(hasty) as connection:
        for pause in (2.5, 0):
            connection.sendall(ask)
            assert status(read(connection, b"]}")) == 200
            time.sleep(pause)
