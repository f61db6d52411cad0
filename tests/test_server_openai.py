"""The official `openai` client against a real web server over a fake engine."""

from __future__ import annotations

import contextlib
import json
import socket
import threading

import openai
import pytest
import uvicorn
from fake_llm import FakeLLM
from server_cases import *  # noqa: F403

from hotplug.core.errors import EngineDeadError, NotReadyError, QueueFullError
from hotplug.server.app import create_app
from hotplug.server.config import ServerConfig
from hotplug.server.serve import listen, url_of

KEY = "sk-right"


class Running:
    """A server in a thread, with the engine front end that its tests steer."""

    def __init__(self, llm: FakeLLM, config: ServerConfig) -> None:
        self.llm = llm
        self.socket = listen(config)
        self.url = url_of(config, self.socket)
        self.server = uvicorn.Server(uvicorn.Config(create_app(llm, config), log_level="error"))
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))

    @contextlib.contextmanager
    def started(self):
        self.thread.start()
        try:
            yield self
        finally:
            self.server.should_exit = True
            self.thread.join()


@pytest.fixture(scope="module")
def running():
    with Running(FakeLLM(), ServerConfig(port=0, api_key=(KEY,))).started() as running:
        yield running


@pytest.fixture
def client(running):
    with openai.OpenAI(base_url=running.url + "/v1", api_key=KEY, max_retries=0, timeout=20) as client:
        yield client


@pytest.fixture
def model():
    return "fake"


@pytest.fixture
def llm(running):
    """The fake, as good as new for the next test."""
    yield running.llm
    running.llm.__dict__.update(FakeLLM().__dict__ | {"observer": running.llm.observer})


def chat(client):
    return client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "hi"}])


def test_wrong_key_is_an_authentication_error(running):
    with (
        openai.OpenAI(base_url=running.url + "/v1", api_key="sk-wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_full_queue_is_a_rate_limit_error_with_retry_after(client, llm):
    llm.refuse = QueueFullError("4096 requests wait", retry_after=7)
    with pytest.raises(openai.RateLimitError) as error:
        chat(client)
    assert error.value.response.headers["retry-after"] == "7"


def test_full_queue_refuses_a_stream_with_its_status(client, llm):
    llm.refuse = QueueFullError("4096 requests wait", retry_after=7)
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model="fake", prompt="x", stream=True)


def test_full_queue_refuses_one_of_several_prompts(client, llm):
    llm.refuse = QueueFullError("4096 requests wait", retry_after=7)
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model="fake", prompt=["x", "y"])


def test_engine_that_starts_is_unavailable_with_retry_after(client, llm):
    llm.ready = False
    with pytest.raises(openai.InternalServerError) as error:
        chat(client)
    assert error.value.status_code == 503
    assert int(error.value.response.headers["retry-after"]) > 0


def test_engine_that_restarts_refuses_at_the_first_token(client, llm):
    llm.refuse = NotReadyError("the engine is starting")
    with pytest.raises(openai.InternalServerError) as error:
        chat(client)
    assert error.value.status_code == 503


def test_dead_engine_is_a_server_error_without_its_traceback(client, llm):
    llm.refuse = EngineDeadError("the engine ended with code 1\nTraceback: secret.py", why="secret.py")
    with pytest.raises(openai.InternalServerError) as error:
        chat(client)
    assert error.value.code == "engine_dead"
    assert "secret" not in str(error.value)


def test_death_during_a_stream_is_an_error_event(client, llm):
    llm.break_after = (2, EngineDeadError("the engine process ended with code 1"))
    seen = ""
    with pytest.raises(openai.APIError, match="ended with code 1"):
        for part in client.completions.create(model="fake", prompt="x", stream=True):
            seen += part.choices[0].text
    assert seen == "ab"


def test_large_body_is_refused_while_it_is_read(running, client):
    with pytest.raises(openai.APIStatusError) as error:
        client.completions.create(model="fake", prompt="x" * (33 << 20))
    assert error.value.status_code == 413


def post(running, body: dict) -> socket.socket:
    data = json.dumps({"model": "fake", "prompt": "x", **body}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    connection = socket.create_connection(running.socket.getsockname(), timeout=20)
    connection.sendall(head.encode() + data)
    return connection


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    got = b""
    while mark not in got:
        got += connection.recv(4096)
    return got


def test_client_that_leaves_a_stream_aborts_the_request(running, llm):
    llm.hang_after = 2
    with post(running, {"stream": True}) as connection:
        read_until(connection, b'"text":"b"')
        assert not llm.aborted.is_set()
    assert llm.aborted.wait(5)


def test_client_that_leaves_before_the_answer_aborts_the_request(running, llm):
    llm.hang_after = 0
    with post(running, {}):
        assert llm.hanging.wait(5)
    assert llm.aborted.wait(5)


def test_client_that_leaves_aborts_every_prompt_of_the_request(running, llm):
    llm.hang_after = 1
    with post(running, {"stream": True, "prompt": ["x", "y"]}) as connection:
        read_until(connection, b'"index":1')
    assert llm.aborted.wait(5)


def test_stream_ends_with_done_and_has_the_sse_content_type(running, llm):
    with post(running, {"stream": True, "max_tokens": 2}) as connection:
        got = read_until(connection, b"[DONE]")
    assert b"content-type: text/event-stream" in got.lower()
    assert got.rstrip(b"\r\n0").endswith(b"data: [DONE]")
