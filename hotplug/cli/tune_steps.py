"""`hotplug tune --defaults`: run a model with steps of several sizes, and keep what each reached.

The load is a chat-like mix: requests of lognormal lengths, all at once, so that the device always has as many as a step
holds until the last ones drain. The record is `hotplug.core.startup.step_record`'s; the next start reads it.
"""

from __future__ import annotations

import dataclasses
import gc
import random
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

import hotplug
from hotplug.cli.bench_engine import Run, measure
from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.errors import ConfigError, OutOfMemoryError
from hotplug.core.startup import step_record
from hotplug.core.startup.bind import Bound, bind
from hotplug.core.startup.step_record import Measured, StepRecord

MIX = 500
"""Requests of a run."""
LONGEST = (2000, 1000)
"""Tokens of a prompt and of an output, at most."""
REPEAT = 2
"""Runs; the rate is the better one: what disturbs a run only ever makes it slower."""
FACTORS = (0.5, 1, 2, 4)
"""Candidates for the requests of a step, times what the platform prefers, as far as a run has so many."""
TOKENS = (2048, 8192)
"""Candidates for the tokens of prompts beside them, besides what the platform prefers."""
WORSE = 0.98
"""Of the best rate so far: where more requests at once reach less, no more are tried."""

Report = Callable[[int, int, str], None]
"""Told of every size of step: requests, tokens, and its figures or why it did not run."""


def tune_steps(engine: EngineConfig, report: Report, output: Path | None) -> tuple[Path, StepRecord]:
    """Measure requests at the platform's tokens, then tokens at the best requests, and write the record.

    Raises ConfigError where a size is asked for, or none runs.
    """
    if engine.max_num_seqs is not None or engine.max_num_batched_tokens is not None:
        raise ConfigError("--defaults measures steps of every size, and one is asked for",
                          hint="Leave out --max-num-seqs and --max-num-batched-tokens.")  # fmt: skip
    engine = dataclasses.replace(engine, enable_prefix_cache=False)
    bound = bind(engine, meta=True)
    measured: list[Measured] = []
    limits = bound.placement.limits
    prompts = max(limits.step_tokens - limits.step_requests, limits.step_requests)

    def record() -> StepRecord:
        size = step_record.weight_bytes(bound.checkpoint.config, bound.model.context.dtype.itemsize)
        return StepRecord(_name(bound), size // engine.tensor_parallel_size, measured, _about())

    for factor in FACTORS:
        requests = int(factor * limits.step_requests)
        if measured and requests > MIX + MIX // 10:
            break
        before = max((one.output_tokens_per_s for one in measured), default=0.0)
        found = _measured(engine, requests, requests + prompts, report)
        if found is None:
            break  # more take more memory
        measured.append(found)
        if found.output_tokens_per_s < WORSE * before:
            break  # the device has all the work that it can do together
    if not measured:
        raise ConfigError("no size of step runs this model")
    requests = record().best.requests
    for tokens in TOKENS:
        if tokens != prompts and (found := _measured(engine, requests, requests + tokens, report)) is not None:
            measured.append(found)
    path = output or step_record.own_file(bound.placement.selection)
    step_record.write(path, record(), bound.placement.device.name)
    return path, record()


def mix(vocab_size: int, count: int, room: int, seed: int) -> tuple[list[list[int]], list[int]]:
    """Prompts and output lengths like those of chats; the lengths are the same for every seed. Raises ConfigError where
    the longest does not fit into sequences of `room` tokens."""
    if room < sum(LONGEST):
        raise ConfigError(f"steps are measured with sequences of {sum(LONGEST)} tokens; this engine's hold {room}",
                          hint="Raise --max-model-len or --kv-cache-memory.")  # fmt: skip
    lengths, draw = random.Random(0), random.Random(seed)

    def length(mean: float, spread: float, most: int) -> int:
        return int(min(most, max(8, lengths.lognormvariate(mean, spread))))

    sizes = [(length(5.0, 1.0, LONGEST[0]), length(5.2, 0.8, LONGEST[1])) for _ in range(count)]
    return [[draw.randrange(vocab_size) for _ in range(n)] for n, _ in sizes], [n for _, n in sizes]


def _measured(engine: EngineConfig, requests: int, tokens: int, report: Report) -> Measured | None:
    """The figures of steps of one size; None where they do not fit into memory."""
    try:
        core = EngineCore(dataclasses.replace(engine, max_num_seqs=requests, max_num_batched_tokens=tokens))
        core.wait_until_compiled()
        runs = [_run(core, seed) for seed in range(REPEAT + 1)][1:]
        core.close()
    except OutOfMemoryError as e:
        report(requests, tokens, str(e))
        return None
    finally:
        gc.collect()  # weights and cache of the one before, before those of the next
    best = min(runs, key=lambda run: run.seconds)
    gaps = sorted(gap for run in runs for gap in run.gaps)
    found = Measured(requests, tokens, round(best.output_tokens / best.seconds, 1),
                     round(gaps[int(0.99 * (len(gaps) - 1))] * 1e3, 2))  # fmt: skip
    report(requests, tokens, f"{found.output_tokens_per_s:>9,.0f} output tokens/s, gap {median(gaps) * 1e3:.1f} ms, "
                             f"99th percentile {found.gap_p99_ms:.1f}")  # fmt: skip
    return found


def _run(core: EngineCore, seed: int) -> Run:
    count = MIX if seed else MIX // 10  # the first one warms up
    prompts, lengths = mix(core.vocab_size, count, core.max_model_len, seed)
    return measure(core, prompts, lengths)


def _name(bound: Bound) -> str:
    model = bound.checkpoint.config
    return f"{model.architecture}, {model.num_layers} layers of {model.hidden_size}"


def _about() -> dict[str, object]:
    return {"hotplug": hotplug.__version__, "torch": str(torch.__version__), "requests": MIX, "repeat": REPEAT}
