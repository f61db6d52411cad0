"""hotplug, its engine without its server."""

from __future__ import annotations

import time
from typing import Any

import hotplug
from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.request import Request, SamplingParams
from hotplug.platforms import cpu
from hotplug.platforms.cpu.native import library


class Hotplug:
    """Options: those of `EngineConfig`, and "isa", an instruction set that is not to be exceeded."""

    def __init__(self, options: dict[str, Any]) -> None:
        isa = options.pop("isa", None)
        if isa is not None:
            library.load().use(isa)
            cpu._ISAS = ((isa, isa),)
        self._core = EngineCore(EngineConfig(**options))
        self._core.wait_until_compiled()
        self._asked = 0
        self.plan_hash = self._core.plan_hash
        report = self._core.report()
        self.about = f"hotplug {hotplug.__version__}, {report['dtype']}, exec {report['exec']}"

    def generate(self, prompts: list[list[int]], new_tokens: int, *, share: bool) -> list[list[float]]:
        sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        times: dict[str, list[float]] = {}
        begin = time.perf_counter()
        for prompt in prompts:
            self._asked += 1
            times[str(self._asked)] = []
            self._core.add(Request(id=str(self._asked), prompt_token_ids=prompt, sampling=sampling))
        while self._core.has_work:
            deltas = self._core.step()
            now = time.perf_counter() - begin
            for delta in deltas:
                if delta.finish_reason == "error":
                    raise RuntimeError(delta.error)
                times[delta.request_id] += [now] * len(delta.token_ids)
        return list(times.values())


def start(options: dict[str, Any]) -> Hotplug:
    return Hotplug(options)
