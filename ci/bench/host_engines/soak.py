"""Very many short requests through AsyncLLM and its engine process: `python soak.py OPTIONS`.

OPTIONS is JSON: model, requests, tokens, clients. The tokens of every request are compared with the null device's
chain. Memory is that of this process and the engine's, after the first tenth and from there on. Prints {"grown_mib": at
the end, "highest_mib", "settled_mib": after the first tenth, "leaked_blocks", "wrong": requests whose tokens are not
the chain, "seconds"}.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from typing import Any

import psutil
from null_device.tokens import chain

from hotplug import AsyncLLM, SamplingParams
from hotplug.core.config import EngineConfig
from hotplug.core.request import EngineStats

MIB = 2**20
IDLE = 10.0
"""Seconds in which the engine has to be empty after the last answer."""


class _Watch:
    """An observer that keeps the engine's latest counts."""

    def __init__(self) -> None:
        self.latest = EngineStats()

    def stats(self, stats: EngineStats) -> None:
        self.latest = stats

    def first_token(self, seconds: float) -> None: ...

    def inter_token(self, seconds: float, tokens: int) -> None: ...

    def inter_tokens(self, seconds: Sequence[float]) -> None: ...

    def queued(self, seconds: float) -> None: ...

    def finished(self, reason: str, prompt_tokens: int, output_tokens: int, seconds: float) -> None: ...


class _Chains:
    """The one cycle of tokens, so that a chain is a slice of it."""

    def __init__(self, vocab: int, most: int) -> None:
        cycle = chain(0, vocab, vocab)
        self._place = {token: i for i, token in enumerate(cycle)}
        self._cycle = cycle + cycle[:most]

    def after(self, token: int, length: int) -> list[int]:
        begin = self._place[token] + 1
        return self._cycle[begin : begin + length]


async def run(model: str, requests: int, tokens: int, clients: int) -> dict[str, Any]:
    watch = _Watch()
    llm = AsyncLLM(
        EngineConfig(model=model, device="null_device", load_format="dummy", max_num_seqs=clients,
                     max_model_len=512, kv_cache_memory="64MiB"),
        watch,
    )  # fmt: skip
    await llm.start()
    await llm.wait_ready()
    assert llm.engine_pid is not None
    family = [psutil.Process(), psutil.Process(llm.engine_pid)]
    chains = _Chains(llm.vocab_size, tokens + 1)
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    draw = random.Random(0)
    left, done, wrong = requests, 0, 0
    settled = highest = 0

    def memory() -> int:
        return sum(p.memory_info().rss for p in family)

    async def client() -> None:
        nonlocal left, done, wrong, settled, highest
        while left > 0:
            left -= 1
            prompt = [draw.randrange(llm.vocab_size) for _ in range(draw.randrange(8, 40))]
            output = (await llm.generate(prompt, params)).outputs[0]
            wrong += output.token_ids != chains.after(prompt[-1], tokens)
            done += 1
            if done == max(1, requests // 10):
                settled = memory()
            if done % max(1, requests // 20) == 0:
                highest = max(highest, memory())

    begin = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - begin
    deadline = time.monotonic() + IDLE
    while (watch.latest.running or watch.latest.waiting) and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    last = memory()
    await llm.close()
    return {
        "grown_mib": (last - settled) / MIB,
        "highest_mib": (max(highest, last) - settled) / MIB,
        "settled_mib": settled / MIB,
        "leaked_blocks": watch.latest.kv_blocks_used,
        "wrong": wrong,
        "seconds": seconds,
    }


def main() -> None:
    print(json.dumps(asyncio.run(run(**json.loads(sys.argv[1])))))


if __name__ == "__main__":
    main()
