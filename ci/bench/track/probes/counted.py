"""Counts of fixed scenarios, each in a process of its own: `python -m track.probes.counted SCENARIO OPTIONS`.

Prints {count: value}. What is counted does not depend on the clock, so that it is the same in every run.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
from types import CodeType, FrameType
from typing import Any

import zmq

from track.probes.loop import WARM, Loop
from track.probes.places import attribute, find

RUN = 60
STEPS = WARM + RUN + 1
"""Of a run: a multiple of a block's tokens, so that every row gets as many blocks in each."""


def loop(model: str) -> dict[str, float]:
    """Steady decode of 64 requests on the null device."""
    received = _Received()
    one = Loop(model, 64, 600, drain=received.begin)
    gc.collect()
    gc.disable()
    one.milliseconds(RUN)
    before, sent = sys.getallocatedblocks(), received.settled()
    one.milliseconds(RUN)
    kept, sent = sys.getallocatedblocks() - before, received.settled() - sent
    calls = _Calls()
    sys.setprofile(calls)
    one.milliseconds(RUN)
    sys.setprofile(None)
    return {
        "loop.python_calls_a_step": calls.python / STEPS,
        "loop.c_calls_a_step": calls.c / STEPS,
        "loop.registry_lookups": calls.lookups,
        "loop.blocks_kept_a_step": kept / STEPS,
        "loop.bytes_sent_a_token": sent / (STEPS * 64),
    }


class _Received:
    """The front end's end of the link, in a thread: counts bytes."""

    def __init__(self) -> None:
        self._bytes = 0
        self._seen = threading.Event()

    def begin(self, address: str) -> None:
        socket = zmq.Context().socket(zmq.PULL)
        socket.bind(address)
        threading.Thread(target=self._take, args=(socket,), daemon=True).start()

    def _take(self, socket: Any) -> None:
        while True:
            self._bytes += sum(map(len, socket.recv_multipart()))
            self._seen.set()

    def settled(self) -> int:
        """Bytes so far, once none have come for half a second."""
        while True:
            self._seen.clear()
            if not self._seen.wait(0.5):
                return self._bytes


class _Calls:
    """A profile function: calls of Python functions, of C functions, and those of the registry's methods."""

    def __init__(self) -> None:
        registry = find("OpRegistry", "hotplug.core.ops.registry", "hotplug.core.ops")
        self._registry = {code for value in vars(registry).values() if (code := _code(value)) is not None}
        self.python = self.c = self.lookups = 0

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            self.python += 1
            self.lookups += frame.f_code in self._registry
        elif event == "c_call":
            self.c += 1


def _code(value: object) -> CodeType | None:
    function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    return getattr(function, "__code__", None)


def cpu(model: str) -> dict[str, float]:
    """A recorded decode step of SmolLM2 on the CPU: calls of the native library, and runs of them without a break."""
    from hotplug import LLM, SamplingParams

    library = find("load", "hotplug.platforms.cpu.native.library")().c
    original, replayed = library.hp_replay, []

    def replay(entries: object, count: int, failed: object) -> int:
        replayed.append(count)
        return int(original(entries, count, failed))

    library.hp_replay = replay
    llm = LLM(model, device="cpu", max_model_len=512, max_num_seqs=4, kv_cache_memory="64MiB", exec="capture")

    def calls(tokens: int) -> tuple[int, int]:
        replayed.clear()
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        llm.generate([[1000, 1001, 1002, 1003]], params, progress=False)
        return sum(replayed), len(replayed)

    calls(8)
    modules = len(sys.modules)
    few, many, steps = calls(8), calls(24), 16
    stats = attribute(llm, "core", "_core").stats()
    return {
        "cpu.native_calls_a_step": (many[0] - few[0]) / steps,
        "cpu.replays_a_step": (many[1] - few[1]) / steps,
        "cpu.recompiles": stats.recompiles,
        "cpu.modules": modules,
    }


SCENARIOS = {"loop": loop, "cpu": cpu}


def main() -> None:
    print(json.dumps(SCENARIOS[sys.argv[1]](**json.loads(sys.argv[2]))), flush=True)


if __name__ == "__main__":
    main()
