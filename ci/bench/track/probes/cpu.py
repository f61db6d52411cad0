"""SmolLM2 on the CPU through `hotplug.LLM`."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from track.probes.places import attribute

VOCAB = 40_000
"""Prompts are random ids below this."""


class Cpu:
    def __init__(self, model: str) -> None:
        from hotplug import LLM, SamplingParams

        self._llm = LLM(model, device="cpu", max_model_len=2048, max_num_seqs=16, kv_cache_memory="512MiB")
        core = attribute(self._llm, "core", "_core")
        self.plan_hash: str | None = core.plan_hash
        wait = getattr(core, "wait_until_compiled", None)
        if wait is not None:
            wait()
        self._sampling = SamplingParams
        self._draw = random.Random(0)
        self._probes: dict[str, Callable[[], float]] = {
            "cpu-one": lambda: self._rate([self._ids(8)], 17),
            "cpu-prompt": lambda: self._seconds([self._ids(1024)], 1) * 1e3,
            "cpu-16": lambda: self._rate([self._ids(16) for _ in range(16)], 9),
            "cpu-prefix": self._prefix,
        }

    def measure(self, probe: str) -> dict[str, float]:
        return {probe: self._probes[probe]()}

    def _ids(self, count: int) -> list[int]:
        """Ids that no cached prefix has."""
        return [self._draw.randrange(1000, VOCAB) for _ in range(count)]

    def _prefix(self) -> float:
        shared = self._ids(256)
        return self._rate([shared + self._ids(8) for _ in range(8)], 9)

    def _rate(self, prompts: list[list[int]], tokens: int) -> float:
        return len(prompts) * tokens / self._seconds(prompts, tokens)

    def _seconds(self, prompts: list[list[int]], tokens: int) -> float:
        params = self._sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        begin = time.perf_counter()
        outputs = self._llm.generate(prompts, params, progress=False)
        seconds = time.perf_counter() - begin
        got = [len(output.outputs[0].token_ids) for output in outputs]
        if got != [tokens] * len(prompts):
            raise RuntimeError(f"{got} tokens came instead of {tokens} each")
        return seconds


def start(options: dict[str, Any]) -> Cpu:
    return Cpu(options["model"])
