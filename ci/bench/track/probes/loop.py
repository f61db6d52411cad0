"""The engine process' loop with all requests decoding, on a device that computes nothing; a run is some steps of it.

It is hotplug's own loop: plan, prepare, launch, wait, update, send. The device makes it wait for nothing, so its
thread's processor time is its time, and does not count what others do on the core meanwhile. Another process takes the
messages and throws them away. This probe reaches into the engine, so it looks its parts up where they are or were
(`places`).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import zmq

from track.probes.places import attribute, find, first

STEPS = {"loop-64": (64, 250), "loop-256": (256, 120), "loop-1024": (1024, 30)}
"""Requests, and steps of a run."""
WARM = 3
"""Steps of a run before those that are timed: the other tree's run has emptied the caches."""
MOST_RUNS = 31
SETTLE = 40
"""Steps before the first run: sizes are recorded, buffers grow."""
PROMPT, MOST_TOKENS, BLOCK_BYTES = 64, 8000, 16 * 2048

SWALLOW = """
import os, sys, zmq
socket = zmq.Context().socket(zmq.PULL)
socket.bind(sys.argv[1])
poller = zmq.Poller()
poller.register(socket, zmq.POLLIN)
parent = os.getppid()
while os.getppid() == parent:
    if poller.poll(1000):
        socket.recv_multipart(copy=False)
"""
"""A process that takes messages until its parent is gone."""


def _swallow(address: str) -> None:
    subprocess.Popen([sys.executable, "-c", SWALLOW, address])


class _EnoughError(Exception):
    """Leaves the loop."""


class Loop:
    """One engine with all of its requests decoding."""

    def __init__(self, model: str, rows: int, tokens: int, drain: Callable[[str], object] = _swallow) -> None:
        """`drain` takes the messages that come to an address."""
        engine = "hotplug.core.engine"
        config = find("EngineConfig", "hotplug.core.config")
        link = first(f"{engine}.endpoints.Endpoints", f"{engine}.link.Link")(tempfile.mkdtemp())
        context = zmq.Context()
        inbox = context.socket(zmq.PULL)
        inbox.bind(link.inbox)
        drain(link.outbox(0))
        clients = find("Clients", f"{engine}.clients")(context, link)
        blocks = rows * (-(-(PROMPT + 16 + tokens) // 16) + 1)
        options = config(model=model, device="null_device", load_format="dummy", max_num_seqs=rows,
                         max_num_batched_tokens=8192, kv_cache_memory=(blocks + 64) * BLOCK_BYTES)  # fmt: skip
        self._engine = find("EngineProcess", f"{engine}.process")(options, inbox, clients)
        core: Any = attribute(self._engine, "_core", "core")
        self.plan_hash: str | None = core.plan_hash
        self._step = core.step
        self._steps = self._left = 0
        self._begin = self._end = 0.0
        core.step = self._timed
        for request in _requests(rows, tokens):
            core.add(request)
        while core.stats().waiting or core.stats().generated_tokens <= rows:
            self.milliseconds(1)
        self.milliseconds(SETTLE)

    def _timed(self) -> Any:
        """Stands in for `core.step`: leaves the loop after the run's last step."""
        result = self._step()
        self._end = time.thread_time()
        if self._left == self._steps:
            self._begin = self._end
        elif not self._left:
            raise _EnoughError
        self._left -= 1
        return result

    def milliseconds(self, steps: int) -> float:
        """Of the thread's processor time a step, the mean of `steps` of them."""
        self._steps, self._left = steps, WARM + steps
        try:
            self._engine.run()
        except _EnoughError:
            return (self._end - self._begin) / steps * 1e3
        raise RuntimeError("the loop ended by itself")


def _requests(rows: int, tokens: int) -> list[Any]:
    """Random prompts of staggered lengths, so that rows do not all need a block in the same step."""
    request, params = (find(name, "hotplug.core.request") for name in ("Request", "SamplingParams"))
    sampling = params(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    return [
        request(id=f"request-{i}", prompt_token_ids=[1000 + (i * 7919 + j) % 40000 for j in range(PROMPT + i % 16)],
                sampling=sampling)
        for i in range(rows)
    ]  # fmt: skip


class Loops:
    """An engine for each probe, made when it is first asked for."""

    plan_hash: str | None = None

    def __init__(self, model: str) -> None:
        self._model = model
        self._made: dict[str, Loop] = {}

    def measure(self, probe: str) -> dict[str, float]:
        rows, steps = STEPS[probe]
        if probe not in self._made:
            self._made[probe] = Loop(self._model, rows, min(MOST_TOKENS, SETTLE + 10 + (WARM + steps) * MOST_RUNS))
        return {probe: self._made[probe].milliseconds(steps)}


def start(options: dict[str, Any]) -> Loops:
    return Loops(options["null_model"])
