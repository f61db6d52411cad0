"""A running `hotplug serve`, for tests and benchmarks: its address, its metrics, its processes, its end."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import httpx2
import psutil


class Served:
    """`hotplug serve` with these arguments on a free port; ready when made. `stop` it."""

    def __init__(
        self, *arguments: str, log: IO[str] | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        """`log` takes its standard error instead of ours. Raises RuntimeError if it ends before it is ready."""
        command = [sys.executable, "-m", "hotplug.cli", "serve", *arguments, "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        self.url = self._ready_url()

    def _ready_url(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if match := re.match(r"ready\s+(\S+)", line):
                return match[1]
        raise RuntimeError(f"the server ended with {self.process.wait()} before it was ready")

    def metric(self, name: str) -> float:
        for line in httpx2.get(f"{self.url}/metrics", timeout=60).text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[1])
        raise LookupError(f"no metric {name}")

    def until_idle(self, seconds: float = 30.0) -> None:
        """Wait until no request runs or waits. Raises TimeoutError after `seconds`."""
        deadline = time.monotonic() + seconds
        while self.metric("hotplug_requests_running") + self.metric("hotplug_requests_waiting"):
            if time.monotonic() > deadline:
                raise TimeoutError("requests are still in the engine")
            time.sleep(0.05)

    @property
    def processes(self) -> list[psutil.Process]:
        """The front end, the engine process, and whatever they have started."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def rss(self) -> int:
        """Bytes, summed over the processes; what they share counts in each."""
        return sum(p.memory_info().rss for p in self.processes)

    def peak_rss(self) -> int:
        """The same at its highest, each process at its own time. Linux only."""
        return sum(_peak(p.pid) for p in self.processes)

    def stop(self) -> int:
        """End it as a user would, and return its exit code."""
        self.process.terminate()
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()


def _peak(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
