"""A server in processes of its own, its clients, and what a test needs to know of its processes."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import psutil
from prometheus_client.parser import text_string_to_metric_families

CLEAR = 2.0
"""Seconds after a fault within which everything is in a clear state."""
_PROGRAM = """
import json, sys
from hotplug.core.config import EngineConfig
from hotplug.server.config import ServerConfig
from hotplug.server.serve import run

if __name__ == "__main__":
    engine, server = json.loads(sys.argv[1])
    run(EngineConfig(**engine), ServerConfig(**server), on_ready=lambda url: print(url, flush=True))
"""
MODEL = "tiny"


class Server:
    """A running server. Every process is its child or grandchild."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url
        self.port = int(url.rsplit(":", 1)[1])

    def _children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    @property
    def processes(self) -> list[psutil.Process]:
        found = psutil.Process(self.process.pid)
        return [found, *found.children(recursive=True)]

    @property
    def engine(self) -> psutil.Process:
        [found] = [p for p in self._children() if "spawn_main" in " ".join(p.cmdline())]
        return found

    @property
    def front_ends(self) -> list[psutil.Process]:
        """Those that answer: the process itself where there is one."""
        forked = [p for p in self._children() if "forkserver" in " ".join(p.cmdline())]
        return [p for f in forked for p in f.children() if is_alive(p)] or self.processes[:1]

    def cpu_seconds(self) -> float:
        """Processor time of all processes so far."""
        return sum(sum(p.cpu_times()[:2]) for p in self.processes)

    # --- clients ---

    def connect(self, front_end: psutil.Process | None = None, receive_buffer: int | None = None) -> socket.socket:
        """A new connection, to one of the front ends if it is named."""
        for _ in range(200):
            connection = socket.socket()
            if receive_buffer is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            connection.settimeout(30)
            connection.connect(("127.0.0.1", self.port))
            if front_end is None or len(self.front_ends) == 1 or self._accepted_by(connection) == front_end.pid:
                return connection
            connection.close()
        raise AssertionError(f"no connection of 200 went to {front_end}")

    def _accepted_by(self, connection: socket.socket) -> int | None:
        """The front end that has the connection; None if it just waits to be taken."""
        ours = connection.getsockname()[1]

        def owner() -> int | None:
            for front_end in self.front_ends:
                if any(c.raddr and c.raddr.port == ours for c in front_end.net_connections("tcp")):
                    return front_end.pid
            return None

        return until(owner, 0.5)

    def post(self, body: dict[str, Any], connection: socket.socket) -> socket.socket:
        """Ask for a completion over `connection`."""
        data = json.dumps({"model": MODEL, "prompt": "hi", "ignore_eos": True, **body}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
        )
        connection.sendall(head.encode() + b"\r\nConnection: close\r\n\r\n" + data)
        return connection

    def complete(self, **body: Any) -> dict[str, Any]:
        """A whole answer over a connection of its own."""
        asked = {"model": MODEL, "prompt": "hi", "max_tokens": 4, "ignore_eos": True, **body}
        answer = httpx2.post(f"{self.url}/v1/completions", json=asked, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def get(self, path: str, connection: socket.socket | None = None) -> tuple[int, str]:
        """Status and body of an open path."""
        connection = connection or self.connect()
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
        return int(head.split()[1]), body.decode()

    def metrics(self, front_end: psutil.Process | None = None) -> dict[str, float]:
        """Samples without labels, and those of finished requests by reason."""
        status, text = self.get("/metrics", self.connect(front_end))
        assert status == 200, text
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
        return {"_".join((s.name, *s.labels.values())): s.value for s in samples}


def read_all(connection: socket.socket) -> bytes:
    """What comes until the other side closes, or breaks off."""
    parts = []
    with connection:
        try:
            while part := connection.recv(65536):
                parts.append(part)
        except ConnectionError:
            pass
    return b"".join(parts)


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    """What comes up to where `mark` has."""
    got = b""
    while mark not in got:
        part = connection.recv(65536)
        assert part, got
        got += part
    return got


def until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """The first true value of `condition`, or its last after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        found = condition()
        if found or time.monotonic() > end:
            return found
        time.sleep(0.01)


@contextmanager
def live_server(
    model: Path, *, engine: dict[str, Any] | None = None, descriptors: int | None = None, **server: Any
) -> Iterator[Server]:
    """A server that answers; `descriptors`: the most that each process may have open. It is killed afterwards."""
    process = start(model, engine=engine, descriptors=descriptors, **server)
    try:
        url = process.stdout.readline().strip()
        assert url, process.communicate()[1]
        yield Server(process, url)
    finally:
        end(process)


def start(
    model: Path, *, engine: dict[str, Any] | None = None, descriptors: int | None = None, **server: Any
) -> subprocess.Popen[str]:
    """The process of a server, which prints its URL when it answers. It leads a process group."""
    options = {"model": str(model), "served_model_name": MODEL, "load_format": "dummy", "kv_cache_memory": "16MiB"}
    arguments = json.dumps([{**options, **(engine or {})}, {"port": 0, **server}])
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=None if descriptors is None else limit_descriptors(descriptors),
    )  # fmt: skip


def limit_descriptors(number: int) -> Callable[[], None]:
    """What a child process calls before it starts."""
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (number, number))


def left(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those of `processes` that still run after `seconds`."""
    _, alive = psutil.wait_procs(processes, seconds)
    return [p for p in alive if is_alive(p)]


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs; it may end meanwhile."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def end(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
