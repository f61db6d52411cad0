"""The HTTP server over an engine that is none: in a thread of the test, or in a process that takes signals.

`talk` sends bytes as they stand, and returns what comes until the server closes.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fake_llm import FakeLLM
from live_server import limit_descriptors

from hotplug.server.app import create_app
from hotplug.server.config import ServerConfig
from hotplug.server.http import Server
from hotplug.server.serve import listen

_PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
import hotplug.core.engine
from types import ModuleType
from fake_server import SlowLLM

class Engine(SlowLLM):
    def __init__(self, config):
        super().__init__()

    async def close(self):
        print("closed", flush=True)

module = ModuleType("hotplug.core.client.async_llm")
module.AsyncLLM = Engine
sys.modules[module.__name__] = module
from hotplug.core.config import EngineConfig
from hotplug.server.config import ServerConfig
from hotplug.server.serve import run

run(EngineConfig(), ServerConfig(port=0, **json.loads(sys.argv[2])), on_ready=lambda url: print(url, flush=True))
print("over", flush=True)
"""


class SlowLLM(FakeLLM):
    """A token takes a while, so that a request can be met while it runs."""

    async def _misbehave(self, step: int) -> None:
        await asyncio.sleep(0.01)
        await super()._misbehave(step)


@contextmanager
def serving(llm: FakeLLM | None = None, **options: Any) -> Iterator[Server]:
    """A server in a thread; its port is `server.port`."""
    config = ServerConfig(port=0, **options)
    with listen(config) as sock:
        server = Server(create_app(llm or SlowLLM(), config), config, lambda _: None)
        server.port = sock.getsockname()[1]

        def run() -> None:
            with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
                runner.run(server.serve(sockets=[sock]))

        thread = threading.Thread(target=run)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.001)
            yield server
        finally:
            server.should_exit = server.force_exit = True
            thread.join()


class Process:
    """A server in a process. `out` and `err` are there once it has ended."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.port = port
        self.out = self.err = ""

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = 20) -> int:
        self.out, self.err = self.process.communicate(timeout=seconds)
        return self.process.returncode


@contextmanager
def server_process(*, descriptors: int | None = None, **options: Any) -> Iterator[Process]:
    """A server with the signals and the limits of a process; `descriptors`: the most it may have open."""
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(Path(__file__).parent), json.dumps(options)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=None if descriptors is None else limit_descriptors(descriptors),
    )  # fmt: skip
    try:
        url = process.stdout.readline().strip()
        assert url, process.communicate()[1]
        yield Process(process, int(url.rsplit(":", 1)[1]))
    finally:
        process.kill()
        with suppress(ValueError):  # read to the end before
            process.communicate()


# --- clients ----------------------------------------------------------------------------------------


def connect(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.settimeout(20)
    return connection


def read(connection: socket.socket, mark: bytes | None = None) -> bytes:
    """What comes up to `mark`; None: until the server closes."""
    got = b""
    while (mark is None or mark not in got) and (part := connection.recv(65536)):
        got += part
    return got


def talk(port: int, data: bytes) -> bytes:
    with connect(port) as connection:
        with suppress(ConnectionError):  # refused before all of it was sent
            connection.sendall(data)
        return read(connection)


def get(path: str, *headers: str, method: str = "GET", version: str = "1.1") -> bytes:
    """A request without a body, after which the server closes."""
    lines = [f"{method} {path} HTTP/{version}", "Host: x", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


def post(path: str = "/v1/completions", *headers: str, close: bool = True, version: str = "1.1", **body: Any) -> bytes:
    """A completion's request."""
    data = json.dumps({"model": "fake", "prompt": "x", "max_tokens": 5, **body}).encode()
    lines = [f"POST {path} HTTP/{version}", "Host: x", "Content-Type: application/json",
             f"Content-Length: {len(data)}", *(["Connection: close"] if close else []), *headers]  # fmt: skip
    return "\r\n".join([*lines, "", ""]).encode() + data


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def statuses(answers: bytes) -> list[int]:
    """Those of several answers on one connection."""
    return [int(part[:3]) for part in answers.split(b"HTTP/1.1 ")[1:]]


def error(answer: bytes) -> dict[str, Any]:
    """The error that an answer is about."""
    return json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


def head(answer: bytes) -> bytes:
    return answer.partition(b"\r\n\r\n")[0].lower()


def rss(process: int = 0) -> int:
    """Resident bytes of a process."""
    fields = Path(f"/proc/{process or os.getpid()}/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize()
