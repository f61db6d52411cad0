"""The engine process' loop with all requests decoding, timed: `python loop.py OPTIONS`, in a process of its own.

OPTIONS is JSON: model, rows, steps (of a run), repeat, and profile. It is the loop of `hotplug.core.engine.process`
itself: plan, prepare, launch, wait, update, send. Another process takes the messages and throws them away, so that no
front end's work is in the figure. Prints {"step_ms": [of each run], "rows": decoding requests}; with profile, what the
loop's time went to, by function, to standard error first.
"""

from __future__ import annotations

import cProfile
import json
import pstats
import subprocess
import sys
import tempfile
import time
from typing import Any

import zmq

from hotplug.core.config import EngineConfig
from hotplug.core.engine.clients import Clients
from hotplug.core.engine.core import EngineCore
from hotplug.core.engine.endpoints import Endpoints
from hotplug.core.engine.process import EngineProcess
from hotplug.core.request import Request, SamplingParams

SETTLE = 30
"""Steps after the last prompt that are not timed: sizes are recorded, buffers grow."""
PROMPT = 64
BLOCK_BYTES = 16 * 4096
"""No less than what 16 tokens of the benchmark's model take."""


class _EnoughError(Exception):
    """Leaves the loop."""


SWALLOW = """
import sys, zmq
socket = zmq.Context().socket(zmq.PULL)
socket.bind(sys.argv[1])
while True:
    socket.recv_multipart(copy=False)
"""
"""A process that takes messages until it is killed."""


def requests(rows: int, tokens: int) -> list[Request]:
    """Random prompts of staggered lengths, so that rows do not all need a block in the same step."""
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    return [
        Request(id=f"request-{i}", prompt_token_ids=[1000 + (i * 7919 + j) % 40000 for j in range(PROMPT + i % 16)],
                sampling=sampling)
        for i in range(rows)
    ]  # fmt: skip


def engine_config(model: str, rows: int, tokens: int) -> EngineConfig:
    blocks = rows * (-(-(PROMPT + 16 + tokens) // 16) + 1)
    return EngineConfig(model=model, device="null_device", load_format="dummy", max_num_seqs=rows,
                        max_num_batched_tokens=8192, kv_cache_memory=(blocks + 64) * BLOCK_BYTES)  # fmt: skip


class Stamps:
    """When each step of a core ended, once all of its requests decode."""

    def __init__(self, core: EngineCore, rows: int, enough: int, profiler: cProfile.Profile | None) -> None:
        self._core, self._step = core, core.step
        self._rows, self._enough = rows, enough
        self._profiler = profiler
        self._decoding = False
        self.times: list[float] = []

    def __call__(self) -> Any:
        """Stands in for `core.step`."""
        result = self._step()
        if self._decoding:
            self.times.append(time.perf_counter())
            if self._profiler is not None and len(self.times) == SETTLE:
                self._profiler.enable()
            if len(self.times) > self._enough:
                raise _EnoughError
        else:
            stats = self._core.stats()
            self._decoding = stats.waiting == 0 and stats.generated_tokens > self._rows
        return result


def measure(model: str, rows: int, steps: int, repeat: int, profile: bool = False) -> list[float]:
    """Milliseconds a step, a value a run."""
    link = Endpoints(tempfile.mkdtemp())
    context = zmq.Context()
    inbox = context.socket(zmq.PULL)
    inbox.bind(link.inbox)
    drain = subprocess.Popen([sys.executable, "-c", SWALLOW, link.outbox(0)])
    wanted = SETTLE + steps * repeat
    engine = EngineProcess(engine_config(model, rows, wanted + 100), inbox, Clients(context, link))
    core: EngineCore = engine._core
    profiler = cProfile.Profile() if profile else None
    stamps = Stamps(core, rows, wanted, profiler)
    core.step = stamps
    for request in requests(rows, wanted + 100):
        core.add(request)
    try:
        engine.run()
    except _EnoughError:
        pass
    finally:
        drain.kill()
        drain.wait()
        context.destroy(linger=0)
    if profiler is not None:
        profiler.disable()
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(30)
    times = stamps.times[SETTLE:]
    return [(times[(i + 1) * steps] - times[i * steps]) * 1e3 / steps for i in range(repeat)]


def main() -> None:
    options = json.loads(sys.argv[1])
    print(json.dumps({"step_ms": measure(**options), "rows": options["rows"]}))


if __name__ == "__main__":
    main()
