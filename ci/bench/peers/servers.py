"""OpenAI-compatible servers under comparison, each in processes of its own, from nothing to ready and to their end."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import httpx2
import psutil

MODEL = "bench"
"""The name that every server serves its model by."""
FIRST = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 1, "temperature": 0.0}
READY = 600.0
"""Seconds that a server may take to be ready: one that compiles takes minutes."""


class CannotError(Exception):
    """Something cannot be measured here; says why."""


@contextmanager
def served(command: Sequence[str], environment: Mapping[str, str], ready: float = READY) -> Iterator[tuple[str, float]]:
    """Run `command` with `--port` and a free one; its URL and the seconds until it had generated a token.

    Raises CannotError, with the last line of its log, where it ends or is not ready in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log, env=dict(environment),
                                   start_new_session=True)  # fmt: skip
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(process, url, log, begin + ready)
            yield url, time.monotonic() - begin
        finally:
            _end(process)


def _wait(process: subprocess.Popen[bytes], url: str, log: Any, deadline: float) -> None:
    while time.monotonic() < deadline:
        if process.poll() is not None:
            log.seek(0)
            lines = [line.strip() for line in log.read().splitlines() if line.strip()]
            raise CannotError(f"the server ended with {process.returncode} before it was ready: "
                              f"{lines[-1][:200] if lines else 'it said nothing'}")  # fmt: skip
        try:
            answer = httpx2.post(f"{url}/v1/completions", json=FIRST, timeout=max(1.0, deadline - time.monotonic()))
        except httpx2.TransportError:
            time.sleep(0.2)  # it does not listen yet
            continue
        if answer.status_code == 200:
            return
        if answer.status_code in (400, 422):
            raise CannotError(f"the server refused a first token: {answer.text[:200]}")
        time.sleep(0.2)
    raise CannotError("the server was not ready in time")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it as a user would, then kill what has not exited: engines have processes of their own."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in family:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
        child.wait(10)


def with_path(site: str) -> dict[str, str]:
    """This environment with `site` in front of the module path, where one is given."""
    if not site:
        return dict(os.environ)
    inherited = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([site, *([inherited] if inherited else [])])}
