"""A small HTTP load: streams at once, and chats one after another, over connections that are kept open.

It reads no more of an answer than it has to, so that the time is the server's.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from statistics import median
from typing import Any
from urllib.parse import urlsplit

CLIENTS, TOKENS, PROMPT = 64, 32, 32
"""Of the streams."""
CHATS, CHAT_TOKENS = 12, 4
END = b"data: [DONE]\n\n\r\n0\r\n\r\n"
_USAGE = re.compile(rb'"completion_tokens": ?(\d+)')


class Load:
    """Of one server. Its methods raise OSError, EOFError or ValueError where an answer is none."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._host, self._port = str(address.hostname), int(address.port or 80)
        self._loop = asyncio.new_event_loop()
        self._connections: list[Connection] = []
        self._turn = itertools.count()

    def tokens_a_second(self) -> float:
        """Of `CLIENTS` streams that begin at once, over the time until the last has ended."""
        return self._loop.run_until_complete(self._streams())

    def first_token_ms(self) -> float:
        """The median of `CHATS` streamed chats, one after another."""
        return self._loop.run_until_complete(self._chats())

    def stream_bytes(self) -> int:
        """Of the body of one streamed completion."""
        return self._loop.run_until_complete(self._stream())

    async def _stream(self) -> int:
        (connection,) = await self._connected(1)
        return await connection.stream(completion(next(self._turn)), TOKENS)

    async def _connected(self, count: int) -> list[Connection]:
        while len(self._connections) < count:
            self._connections.append(await Connection.open(self._host, self._port))
        return self._connections[:count]

    async def _streams(self) -> float:
        connections = await self._connected(CLIENTS)
        turn = next(self._turn)
        bodies = [completion(turn * CLIENTS + i) for i in range(CLIENTS)]
        begin = time.perf_counter()
        await asyncio.gather(*(c.stream(b, TOKENS) for c, b in zip(connections, bodies, strict=True)))
        return CLIENTS * TOKENS / (time.perf_counter() - begin)

    async def _chats(self) -> float:
        (connection,) = await self._connected(1)
        return median([await connection.chat(chat(next(self._turn)), CHAT_TOKENS) for _ in range(CHATS)]) * 1e3

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()


class Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, host: str, port: int) -> Connection:
        return cls(*await asyncio.open_connection(host, port))

    async def stream(self, request: bytes, tokens: int) -> int:
        """Send a request and read its stream to the end; its bytes. Raises ValueError for another count of tokens."""
        self._writer.write(request)
        await self._status()
        return await self._rest(tokens)

    async def chat(self, request: bytes, tokens: int) -> float:
        """Seconds from sending a chat to the first event with text."""
        begin = time.perf_counter()
        self._writer.write(request)
        await self._status()
        text = b""
        while b'"content":"' not in text.replace(b'"content":""', b""):
            if b"[DONE]" in text:
                raise ValueError("the stream had no text")
            text = text[-1000:] + await self._some()
        seconds = time.perf_counter() - begin
        if not text.endswith(END):
            await self._rest(tokens, text)
        return seconds

    async def _status(self) -> None:
        head = await self._reader.readuntil(b"\r\n\r\n")
        status = head.split(b"\r\n", 1)[0]
        if b" 200 " not in status + b" ":
            raise ValueError(f"the server answered {status.decode(errors='replace')}")

    async def _rest(self, tokens: int, text: bytes = b"") -> int:
        count, last = 0, text
        while not last.endswith(END):
            data = await self._some()
            count += len(data)
            last = last[-2000:] + data
        told = _USAGE.search(last)
        if told is None or int(told[1]) != tokens:
            raise ValueError(f"{told[1].decode() if told else 'no count of'} tokens came instead of {tokens}")
        return count

    async def _some(self) -> bytes:
        data = await self._reader.read(1 << 16)
        if not data:
            raise EOFError("the server closed the connection within an answer")
        return data

    def close(self) -> None:
        self._writer.close()


def completion(number: int) -> bytes:
    """A streamed completion with a prompt of its own."""
    prompt = [1000 + (number * 7919 + i * 31) % 40000 for i in range(PROMPT)]
    return _request("/v1/completions", {"prompt": prompt, "max_tokens": TOKENS})


def chat(number: int) -> bytes:
    words = " ".join(f"word{(number * 31 + i) % 997}" for i in range(40))
    return _request("/v1/chat/completions", {"messages": [{"role": "user", "content": words}],
                                             "max_tokens": CHAT_TOKENS})  # fmt: skip


def _request(path: str, fields: dict[str, Any]) -> bytes:
    body = json.dumps({"model": "bench", "temperature": 0.0, "ignore_eos": True, "stream": True,
                       "stream_options": {"include_usage": True}, **fields}).encode()  # fmt: skip
    head = (
        f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
