"""Input preparation of a prompt chunk of 2,048 tokens, timed: `python prepare.py OPTIONS`, in a process of its own.

OPTIONS is JSON: model, prompts (of a run), repeat. From the plan to the first operation of the model: tokens and new
block-table entries go to the device, positions and slots are asked for there; with the first of the three chunks of a
prompt its request enters the persistent batch and the sampler, with the last a token is asked for. Prints
{"prepare_ms": [the median of each run's chunks]}.
"""

from __future__ import annotations

import json
import random
import sys
import time
from statistics import median
from typing import Any

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.engine.process import freeze_started_objects
from hotplug.core.request import Request, SamplingParams
from hotplug.core.runner.executable import EagerStep

CHUNK, CHUNKS = 2048, 3
WARM_UP = 5
"""Prompts."""


class _Between:
    """Collects the time from one function's call to another's."""

    def __init__(self) -> None:
        self._begin = 0.0
        self.seconds: list[float] = []

    def begins(self, function: Any) -> Any:
        def call(*args: Any) -> Any:
            self._begin = time.perf_counter()
            return function(*args)

        return call

    def ends(self, function: Any) -> Any:
        def call(*args: Any) -> Any:
            self.seconds.append(time.perf_counter() - self._begin)
            return function(*args)

        return call


def measure(model: str, prompts: int, repeat: int) -> list[float]:
    """Milliseconds, a value a run."""
    between = _Between()
    EagerStep.run = between.ends(EagerStep.run)  # type: ignore[method-assign]
    core = EngineCore(
        EngineConfig(model=model, device="null_device", load_format="dummy", max_num_seqs=256,
                     max_num_batched_tokens=CHUNK, kv_cache_memory="256MiB")
    )  # fmt: skip
    core._executor.execute = between.begins(core._executor.execute)  # type: ignore[method-assign]
    draw = random.Random(0)
    sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    freeze_started_objects()
    for i in range(WARM_UP + prompts * repeat):
        prompt = [draw.randrange(1000, 40000) for _ in range(CHUNK * CHUNKS)]
        core.add(Request(id=str(i), prompt_token_ids=prompt, sampling=sampling))
        while core.has_work:
            core.step()
    times, run = between.seconds[WARM_UP * CHUNKS :], prompts * CHUNKS
    return [median(times[i * run : (i + 1) * run]) * 1e3 for i in range(repeat)]


def main() -> None:
    print(json.dumps({"prepare_ms": measure(**json.loads(sys.argv[1]))}))


if __name__ == "__main__":
    main()
