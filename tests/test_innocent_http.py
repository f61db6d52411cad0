"""A hundred requests are in flight while a bad one arrives: all hundred answers are right, and the bad one is refused.

The bad inputs are those that once took a server, or strangers' answers, down with them. A hundred other requests, each
with a prompt of its own, are compared with the answers that they get when nobody disturbs them.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import MODEL, Server, live_server

pytestmark = pytest.mark.timeout(240)
INNOCENTS = 100
TOKENS = 48
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
USER = [{"role": "user", "content": "hi"}]


def completion(**fields: Any) -> tuple[str, bytes]:
    return COMPLETIONS, json.dumps({"model": MODEL, "prompt": "hi", "max_tokens": 4, **fields}).encode()


def chat(**fields: Any) -> tuple[str, bytes]:
    return CHAT, json.dumps({"model": MODEL, "messages": USER, "max_tokens": 4, **fields}).encode()


def raw(path: str, body: bytes) -> tuple[str, bytes]:
    return path, body


def surrogate(field: str, path: str = COMPLETIONS) -> tuple[str, bytes]:
    """Half a surrogate as raw bytes, which no check for the escape finds."""
    make = completion if path == COMPLETIONS else chat
    return path, make(**{field: "MARK"})[1].replace(b"MARK", b"x\xed\xa0\xbd")


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {"leaf": 1}
    for _ in range(levels):
        value = {"a": value}
    return value


BAD: dict[str, Callable[[], tuple[str, bytes]]] = {
    "top_k of 2^63": lambda: completion(top_k=2**63),
    "top_k of 2^64": lambda: completion(top_k=2**64),
    "min_tokens of 2^63": lambda: completion(min_tokens=2**63, max_tokens=None),
    "min_tokens of 2^64": lambda: completion(min_tokens=2**64, max_tokens=None),
    "min_tokens beyond the context": lambda: completion(min_tokens=100_000, max_tokens=None),
    "top_k in chat": lambda: chat(top_k=2**63),
    "seed of 2^64": lambda: completion(seed=2**64),
    "priority of 2^63": lambda: completion(priority=2**63),
    "priority of -2^64": lambda: completion(priority=-(2**64)),
    "n of 2^63": lambda: completion(n=2**63),
    "max_tokens of 2^64": lambda: completion(max_tokens=2**64),
    "logprobs of 2^63": lambda: completion(logprobs=2**63),
    "a stop token id of 2^63": lambda: completion(stop_token_ids=[2**63]),
    "a logit bias at 2^64": lambda: completion(logit_bias={str(2**64): 1}),
    "a logit bias of 1e999": lambda: raw(*_replaced(completion(logit_bias={"5": 12345}), b"12345", b"1e999")),
    "a processor's argument of 2^64": lambda: completion(logits_processors={"x": {"y": 2**64}}),
    "a processor's nested arguments": lambda: completion(logits_processors={"x": nested(200)}),
    "half a surrogate in cache_salt": lambda: surrogate("cache_salt"),
    "half a surrogate in stop": lambda: surrogate("stop"),
    "half a surrogate in the prompt, with echo": lambda: raw(
        *_replaced(completion(prompt="MARK", echo=True), b"MARK", b"\xed\xa0\xbd")
    ),
    "half a surrogate as an unknown field": lambda: raw(*_replaced(completion(MARK=1), b"MARK", b"\xed\xa0\xbd")),
    "half a surrogate, escaped": lambda: raw(*_replaced(completion(stop="MARK"), b"MARK", b"\\ud83d")),
    "half a surrogate, escaped in capitals": lambda: raw(*_replaced(completion(stop="MARK"), b"MARK", b"\\uD83D")),
    "a body in UTF-16": lambda: raw(COMPLETIONS, completion(cache_salt="\U0001f600")[1].decode().encode("utf-16")),
    "2,048 prompts of 128 completions": lambda: completion(prompt=[[1]] * 2048, n=128),
    "a prompt of 200,000 times true": lambda: completion(prompt=[True] * 200_000),
    "a prompt of 1.6 million times true": lambda: raw(
        COMPLETIONS, b'{"model": "tiny", "prompt": [' + b"true," * 1_600_000 + b"true]}"
    ),
    "49,000 logit biases, n of 128": lambda: completion(logit_bias={str(i): 1 for i in range(49_000)}, n=128),
    "a long cache_salt": lambda: completion(cache_salt="x" * 4_000_000, n=128),
    "a long stop": lambda: completion(stop="x" * 4_000_000, n=128),
    "many stops": lambda: completion(stop=["x"] * 500_000, n=128),
    "a chat of 4 MB": lambda: chat(messages=[{"role": "user", "content": "ab cd " * 700_000}]),
    "100,000 empty messages": lambda: chat(messages=[{"role": "user", "content": ""}] * 100_000),
    "a content of 300,000 parts": lambda: chat(
        messages=[{"role": "user", "content": [{"type": "text", "text": ""}] * 100_000}]
    ),
    "deep JSON": lambda: raw(CHAT, b'{"model": "tiny", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "deep template arguments": lambda: chat(chat_template_kwargs=nested(900)),
    "template arguments that collide": lambda: chat(chat_template_kwargs={"self": 1}),
}


def _replaced(request: tuple[str, bytes], old: bytes, new: bytes) -> tuple[str, bytes]:
    assert old in request[1]
    return request[0], request[1].replace(old, new)


@pytest.fixture(scope="module")
def served(tiny_model: Path) -> Iterator[Server]:
    with live_server(tiny_model, engine={"kv_cache_memory": "64MiB", "max_num_seqs": 64}) as server:
        asyncio.run(answers(server))  # whatever is made on first use is made
        yield server


@pytest.fixture(scope="module")
def expected(served: Server) -> list[Any]:
    return asyncio.run(answers(served))


async def post(server: Server, path: str, body: bytes) -> tuple[int, bytes]:
    """Status and body of an answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 26)
    try:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        writer.write(head.encode() + b"\r\nConnection: close\r\n\r\n" + body)
        answer = await reader.read()
    finally:
        writer.close()
    head_bytes, _, payload = answer.partition(b"\r\n\r\n")
    return int(head_bytes.split()[1]), payload


async def innocent(server: Server, number: int) -> Any:
    """The text of one request, greedy; or what came instead."""
    body = {
        "model": MODEL, "prompt": f"innocent number {number}: ", "max_tokens": TOKENS, "temperature": 0,
        "ignore_eos": True,
    }  # fmt: skip
    status, payload = await post(server, COMPLETIONS, json.dumps(body).encode())
    return json.loads(payload)["choices"][0]["text"] if status == 200 else (status, payload)


async def answers(server: Server, bad: tuple[str, bytes] | None = None) -> Any:
    """The answers of all innocents, and with `bad` the status, text and seconds of its refusal too."""
    flight = [asyncio.create_task(innocent(server, number)) for number in range(INNOCENTS // 2)]
    if bad is None:
        flight += [asyncio.create_task(innocent(server, n)) for n in range(INNOCENTS // 2, INNOCENTS)]
        return await asyncio.gather(*flight)
    await asyncio.sleep(0.02)
    begin = time.monotonic()
    refused = asyncio.create_task(post(server, *bad))
    flight += [asyncio.create_task(innocent(server, n)) for n in range(INNOCENTS // 2, INNOCENTS)]
    status, payload = await asyncio.wait_for(refused, 30)
    return await asyncio.gather(*flight), status, payload, time.monotonic() - begin


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_refused_by_name_and_a_hundred_others_are_answered_right(served, expected, name):
    bad = BAD[name]()
    got, status, payload, seconds = asyncio.run(answers(served, bad))
    wrong = [n for n, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b]
    assert not wrong, (len(wrong), got[wrong[0]], expected[wrong[0]])
    assert 400 <= status < 500, (status, payload[:300])
    assert len(payload) < 4096
    error = json.loads(payload)["error"]
    assert error["message"]
    assert seconds < 10


def test_a_server_that_met_all_of_them_still_answers(served, expected):
    assert asyncio.run(answers(served)) == expected
