"""What is measured of servers over HTTP: streams of many clients, time to first token, and doing nothing.

Servers, the load and the open loop are processes of their own; what they take of the processor is told beside.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
from served import Served

OPEN_LOOP = Path(__file__).parent / "open_loop.py"
START = 400.0
"""Seconds that a peer's server may take to be ready."""


class CannotError(Exception):
    """Something cannot be measured here; says why."""


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    url: str
    model: str
    """Its name in the API."""
    pid: int

    def cpu_seconds(self) -> dict[int, float]:
        """Processor time so far, by process, of the server and what it has started."""
        parent = psutil.Process(self.pid)
        found = {}
        for process in (parent, *parent.children(recursive=True)):
            times = process.cpu_times()
            found[process.pid] = times.user + times.system
        return found


@contextmanager
def hotplug(environment: Mapping[str, str], model: Path, *arguments: str) -> Iterator[Server]:
    """`hotplug serve` with a dummy model."""
    with tempfile.TemporaryFile("w+") as log:
        try:
            served = Served(str(model), "--load-format", "dummy", "--served-model-name", "bench", *arguments,
                            log=log, environment=environment)  # fmt: skip
        except RuntimeError as e:
            log.seek(0)
            raise CannotError(f"{e}: {_last_line(log.read())}") from e
        try:
            yield Server(served.url, "bench", served.process.pid)
        finally:
            served.stop()


@contextmanager
def vllm(python: Path, model: Path, max_num_seqs: int) -> Iterator[Server]:
    """vLLM's OpenAI server from the environment of `python`. Raises CannotError where it does not start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = {"model": model, "load-format": "dummy", "dtype": "float32", "served-model-name": "bench",
                 "host": "127.0.0.1", "port": port, "max-model-len": 4096, "max-num-seqs": max_num_seqs}  # fmt: skip
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--no-enable-prefix-caching"]
    for name, value in arguments.items():
        command += [f"--{name}", str(value)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=vllm_environment(), start_new_session=True)
        try:
            _wait_healthy(process, f"http://127.0.0.1:{port}", log)
            yield Server(f"http://127.0.0.1:{port}", "bench", process.pid)
        finally:
            for one in (*_children(process.pid), process):
                one.kill()
            process.wait()


def vllm_environment() -> dict[str, str]:
    return {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": ""}


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _wait_healthy(process: subprocess.Popen[Any], url: str, log: Any) -> None:
    deadline = time.monotonic() + START
    while time.monotonic() < deadline:
        if process.poll() is not None:
            log.seek(0)
            raise CannotError(
                f"its server ended with {process.returncode} before it was ready: {_last_line(log.read())}"
            )
        try:
            if httpx2.get(f"{url}/health", timeout=2).status_code == 200:
                return
        except httpx2.HTTPError:
            pass
        time.sleep(0.5)
    raise CannotError(f"its server was not ready after {START:.0f} s")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it said nothing"


def load(script: Path, server: Server, clients: int, requests: int, inputs: int, outputs: int,
         processes: int) -> dict[str, Any]:  # fmt: skip
    """What `serve_load.py` finds, and `load_cores` and `server_cores`: processor time over wall time."""
    if not script.exists():
        raise CannotError(f"{script} is not here; --load says where it is")
    command = [
        sys.executable,
        str(script),
        server.url,
        server.model,
        *map(str, (clients, requests, inputs, outputs, processes)),
    ]
    before, begin = server.cpu_seconds(), time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    text, errors = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)  # with what its own processes took
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - begin
    match = re.search(r"^LOAD (.*)$", text, re.MULTILINE)
    if match is None:
        raise CannotError(f"the load ended with {process.returncode}: {_last_line(errors)}")
    found: dict[str, Any] = json.loads(match[1])
    if found["errors"] or found["reqs"] < requests // processes * processes:
        raise CannotError(f"{found['errors']} of {requests} requests failed: {found['first_error']}")
    after = server.cpu_seconds()
    found["load_cores"] = (usage.ru_utime + usage.ru_stime) / wall
    found["server_cores"] = [round((after[pid] - before.get(pid, 0.0)) / wall, 2) for pid in after]
    return found


def open_loop(server: Server, rate: float, requests: int) -> list[float]:
    """Sorted milliseconds to the first token. Raises CannotError where a request failed."""
    options = {"url": server.url, "model": server.model, "rate": rate, "requests": requests, "warm_up": int(rate)}
    done = subprocess.run([sys.executable, str(OPEN_LOOP), json.dumps(options)], capture_output=True, text=True,
                          check=False)  # fmt: skip
    if done.returncode:
        raise CannotError(f"the open loop ended with {done.returncode}: {_last_line(done.stderr)}")
    found = json.loads(done.stdout)
    if found["errors"]:
        raise CannotError(f"{len(found['errors'])} requests failed: {found['errors'][0]}")
    return sorted(found["ttft_ms"])


def idle_share(server: Server, seconds: float) -> float:
    """Percent of one core that a server takes while nobody asks anything."""
    time.sleep(min(3.0, seconds))  # what starting left to do
    before, begin = sum(server.cpu_seconds().values()), time.perf_counter()
    time.sleep(seconds)
    return (sum(server.cpu_seconds().values()) - before) / (time.perf_counter() - begin) * 100
