"""The simulator's predictions beside a run on the null device: `python predict.py OPTIONS`, in a process of its own.

OPTIONS is JSON: model, repeat. A mixed trace: prompts and outputs of many lengths, arriving at random. The device's
step is that of its environment. Prints {"throughput", "mean TTFT", "makespan"}: by how many percent each run's
prediction is off.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from statistics import fmean

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.engine.process import freeze_started_objects
from hotplug.core.kv.groups import make_groups
from hotplug.core.kv.manager import KVManager
from hotplug.core.kv.spec import BlockFormat, FullAttention
from hotplug.core.request import Request, SamplingParams
from hotplug.core.scheduler.config import SchedulerConfig
from hotplug.core.scheduler.scheduler import Scheduler
from hotplug.core.tools.simulate import Arrival, linear, simulate

SEQS, BUDGET, MAX_LEN, BLOCK = 32, 512, 2048, 16
REQUESTS, SECONDS = 80, 3.0


def trace(seed: int) -> list[Arrival]:
    """Random requests; no two runs share a prompt."""
    draw = random.Random(seed)
    times = sorted(draw.uniform(0, SECONDS) for _ in range(REQUESTS))
    return [
        Arrival(t, [draw.randrange(1000, 40000) for _ in range(draw.choice((20, 100, 400, 1200)))],
                draw.choice((1, 16, 60, 150)))
        for t in times
    ]  # fmt: skip


def predicted(core: EngineCore, arrivals: list[Arrival]) -> tuple[float, float, float]:
    """Throughput, mean time to first token and makespan by the simulator."""
    groups = make_groups([FullAttention(num_kv_heads=1, head_dim=1)], BlockFormat(BLOCK, "NHD", "float32"))
    kv = KVManager(
        groups,
        num_pages=core.num_blocks,
        max_num_seqs=SEQS,
        max_model_len=MAX_LEN,
    )
    scheduler = Scheduler(SchedulerConfig(max_num_seqs=SEQS, max_num_batched_tokens=BUDGET, max_model_len=MAX_LEN), kv)
    step, token = float(os.environ["NULL_DEVICE_STEP_MS"]) * 1e-3, float(os.environ["NULL_DEVICE_TOKEN_US"]) * 1e-6
    found = simulate(scheduler, linear(step, token=token), arrivals)
    return found.throughput, found.mean_ttft, found.makespan


def real(core: EngineCore, arrivals: list[Arrival], run: int) -> tuple[float, float, float]:
    """The same of the engine, its loop as in its own process."""
    first: dict[str, float] = {}
    tokens, last, arrived = 0, 0.0, 0
    begin = time.perf_counter()
    while core.has_work or arrived < len(arrivals):
        now = time.perf_counter() - begin
        while arrived < len(arrivals) and arrivals[arrived].time <= now:
            a = arrivals[arrived]
            sampling = SamplingParams(temperature=0.0, max_tokens=a.output, ignore_eos=True)
            core.add(Request(id=f"{run}.{arrived}", prompt_token_ids=list(a.prompt), sampling=sampling))
            arrived += 1
        if not core.has_work:
            time.sleep(max(0.0, arrivals[arrived].time - now))
            continue
        for delta in core.step():
            last = time.perf_counter() - begin
            first.setdefault(delta.request_id, last)
            tokens += len(delta.token_ids)
    ttft = fmean(first[f"{run}.{i}"] - a.time for i, a in enumerate(arrivals))
    return tokens / last, ttft, last


def main() -> None:
    options = json.loads(sys.argv[1])
    core = EngineCore(
        EngineConfig(model=options["model"], device="null_device", load_format="dummy", max_num_seqs=SEQS,
                     max_num_batched_tokens=BUDGET, max_model_len=MAX_LEN, block_size=BLOCK, kv_cache_memory="64MiB")
    )  # fmt: skip
    freeze_started_objects()
    real(core, trace(-1), -1)  # records the sizes
    errors: dict[str, list[float]] = {"throughput": [], "mean TTFT": [], "makespan": []}
    for run in range(options["repeat"]):
        arrivals = trace(run)
        for name, ours, its in zip(errors, predicted(core, arrivals), real(core, arrivals, run), strict=True):
            errors[name].append((ours / its - 1) * 100)
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
