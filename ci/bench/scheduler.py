"""Host time of the scheduler for steady decoding, and of the message that a step becomes: its bytes made and read.

    python ci/bench/scheduler.py [--rows 64 256 1024] [--steps 400]

Nothing runs on a device: results are made up. The bar is 0.25 ms for schedule and update at 256 rows. The figures are
medians over steps, so the steps in which many rows get a block show in p99 of schedule and update only.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from hotplug.core.engine import messages
from hotplug.core.kv.groups import make_groups
from hotplug.core.kv.manager import KVManager
from hotplug.core.kv.spec import BlockFormat, FullAttention
from hotplug.core.request import Request, SamplingParams
from hotplug.core.scheduler.config import SchedulerConfig
from hotplug.core.scheduler.plan import StepResult
from hotplug.core.scheduler.scheduler import Scheduler

BLOCK_SIZE, PROMPT, MAX_MODEL_LEN = 16, 100, 4096


def decoding_scheduler(rows: int) -> Scheduler:
    """A scheduler with `rows` requests whose prompts, of staggered lengths, are done."""
    blocks_per_row = MAX_MODEL_LEN // BLOCK_SIZE
    groups = make_groups([FullAttention(num_kv_heads=1, head_dim=1)], BlockFormat(BLOCK_SIZE, "NHD", "float32"))
    kv = KVManager(
        groups, num_pages=rows * blocks_per_row + 1, max_num_seqs=rows,
        max_model_len=MAX_MODEL_LEN,
    )  # fmt: skip
    config = SchedulerConfig(
        max_num_seqs=rows, max_num_batched_tokens=8192, max_model_len=MAX_MODEL_LEN, max_queue=rows
    )
    scheduler = Scheduler(config, kv)
    random = np.random.default_rng(0)
    for i in range(rows):
        prompt = random.integers(3, 30000, PROMPT + i % BLOCK_SIZE).tolist()
        sampling = SamplingParams(temperature=0.0, max_tokens=MAX_MODEL_LEN - len(prompt))
        scheduler.add(Request(id=f"request-{i}", prompt_token_ids=prompt, sampling=sampling, eos_token_ids=(2,), tag=i))
    while scheduler.stats().waiting or scheduler.stats().generated_tokens < rows:
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.update(plan, StepResult(token_ids=np.full(len(plan.rows), 5, np.int32)))
    return scheduler


def measure(rows: int, steps: int) -> dict[str, float]:
    """Milliseconds a step at `rows` decoding requests."""
    scheduler = decoding_scheduler(rows)
    tokens = np.full(rows, 5, np.int32)
    phases = np.empty((steps, 4))
    for step in range(steps):
        times = [time.perf_counter()]
        plan = scheduler.schedule()
        times.append(time.perf_counter())
        assert plan is not None and plan.num_decodes == rows
        gained = scheduler.update(plan, StepResult(token_ids=tokens))
        times.append(time.perf_counter())
        data = messages.encode(messages.Outputs.of(gained, scheduler.stats()))
        times.append(time.perf_counter())
        outputs = messages.decode_from_engine(data)
        assert isinstance(outputs, messages.Outputs)
        columns = [column.tolist() for column in outputs.columns()]
        times.append(time.perf_counter())
        assert len(columns[0]) == len(columns[1]) == rows
        phases[step] = np.diff(times) * 1e3
    schedule, update, encode, decode = np.median(phases, axis=0).tolist()
    both = phases[:, 0] + phases[:, 1]
    return {
        "schedule": schedule, "update": update, "both": float(np.median(both)),
        "p99": float(np.percentile(both, 99)), "encode": encode, "decode": decode,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    for i, rows in enumerate(args.rows):
        figures = measure(rows, args.steps)
        if i == 0:
            print("ms a step".rjust(10) + "".join(name.rjust(16) for name in figures))
        print(str(rows).rjust(10) + "".join(f"{value:16.3f}" for value in figures.values()))


if __name__ == "__main__":
    main()
