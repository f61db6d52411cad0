"""The bars of the first release on a small processor: SmolLM2 in float32, torch's default threads.

    python ci/bench/first_light.py [--repeat 3] [--tokens 64] [--json FILE]

Measures decode speed against transformers in the same process, what 16 requests at once give over one, the
share of a step that scheduling and input preparation take, and the peak memory of a server under load.
Exits 1 where a figure misses its bar.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from prompts import PROMPTS
from reference_model import write_hf_folder
from served import Served

from hotplug.cli.bench_engine import decode_rate, measure, random_prompts
from hotplug.cli.bench_serve import Load, drive
from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.runner.device_batch import DeviceBatch
from hotplug.core.scheduler.scheduler import Scheduler
from hotplug.core.text.tokenizer import Tokenizer
from hotplug.core.text.tokenizer_files import load_tokenizer
from hotplug.core.weights.source import resolve

BATCH = 16
KV_CACHE = "1GiB"
LOAD_REQUESTS, LOAD_PROMPT = 48, 500
"""Together more tokens than 1 GiB of KV blocks hold: every page of the pool is touched."""


@dataclass(frozen=True)
class Figure:
    """One measured figure and the bar it is held to."""

    name: str
    value: float
    unit: str
    bar: float
    at_least: bool

    @property
    def passed(self) -> bool:
        return self.value >= self.bar if self.at_least else self.value <= self.bar

    def row(self) -> str:
        bar = f"{'>=' if self.at_least else '<='} {self.bar:.2f} {self.unit}"
        verdict = "ok" if self.passed else "MISSED"
        return f"{self.name:<58} {self.value:>9.2f} {self.unit:<6} {bar:<14} {verdict}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3, help="interleaved runs; figures are medians")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate a request")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures here")
    args = parser.parse_args()

    path = resolve("smollm2")
    tokenizer = load_tokenizer(path)
    core = EngineCore(
        EngineConfig(dtype="float32", quantization="none", kv_cache_memory=KV_CACHE, enable_prefix_cache=False)
    )
    figures = [
        decode_against_transformers(core, tokenizer, path, args.repeat, args.tokens),
        batching_gain(core, tokenizer, args.repeat, args.tokens),
        host_share(core, tokenizer, args.tokens),
    ]
    report = core.report()
    del core  # its memory is not the server's
    figures.append(serving_memory())

    document = {
        "schema": 1, "benchmark": "first_light", "model": report["model"], "dtype": report["dtype"],
        "device": f"{report['device']['name']} ({report['device']['arch']})", "threads": torch.get_num_threads(),
        "torch": torch.__version__, "plan_hash": report["plan_hash"], "repeat": args.repeat, "tokens": args.tokens,
        "figures": [asdict(f) | {"passed": f.passed} for f in figures],
    }  # fmt: skip
    print(f"{document['model']} {document['dtype']}, {document['device']}, {document['threads']} threads, "
          f"torch {document['torch']}, plan {document['plan_hash']}")  # fmt: skip
    for figure in figures:
        print(figure.row())
    print(json.dumps(document))
    if args.json is not None:
        args.json.write_text(json.dumps(document, indent=2) + "\n")
    sys.exit(any(not f.passed for f in figures))


def decode_against_transformers(
    core: EngineCore, tokenizer: Tokenizer, path: Path, repeat: int, tokens: int
) -> Figure:  # fmt: skip
    """Decode tokens/s of one request over those of `transformers` generate, interleaved, medians."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        write_hf_folder(path, Path(folder))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # as many tokens as asked for, on both sides
    ours, theirs = [], []
    for i in range(repeat + 1):
        prompt = tokenizer.encode(PROMPTS[i % len(PROMPTS)])
        ours.append(decode_rate(measure(core, [prompt], tokens)))
        theirs.append(_transformers_rate(model, prompt, tokens))
    ours, theirs = ours[1:], theirs[1:]  # the first pair warms up
    name = f"one request: {median(ours):.1f} tok/s, transformers {median(theirs):.1f}"
    return Figure(name, median(ours) / median(theirs), "x", 1.0, True)


class _Clock:
    """A transformers streamer that notes when tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None: ...


def _transformers_rate(model: Any, prompt: list[int], tokens: int) -> float:
    clock = _Clock()
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, streamer=clock)
    assert len(clock.times) == tokens + 1  # the prompt, then every token
    return (tokens - 1) / (clock.times[-1] - clock.times[1])


def batching_gain(core: EngineCore, tokenizer: Tokenizer, repeat: int, tokens: int) -> Figure:
    """Output tokens/s of 16 requests at once over one alone, prompts included, interleaved, medians."""
    prompts = [tokenizer.encode(p) for p in PROMPTS[:BATCH]]
    one, many = [], []
    for i in range(repeat):
        alone = measure(core, [prompts[i % BATCH]], tokens)
        together = measure(core, prompts, tokens)
        one.append(alone.output_tokens / alone.seconds)
        many.append(together.output_tokens / together.seconds)
    name = f"{BATCH} requests: {median(many):.1f} tok/s, one: {median(one):.1f}"
    return Figure(name, median(many) / median(one), "x", 3.0, True)


def host_share(core: EngineCore, tokenizer: Tokenizer, tokens: int) -> Figure:
    """Share of a step's time that scheduling and input preparation take at batch 16, all rows decoding."""
    prompts = [tokenizer.encode(p) for p in PROMPTS[:BATCH]]
    parts = ((Scheduler, "schedule"), (Scheduler, "update"), (DeviceBatch, "update_tables"), (DeviceBatch, "inputs"))
    shares, steps = [], []
    step = core.step
    with _timed(parts) as spent:

        def timed_step() -> Any:
            before, start = spent[0], time.perf_counter()
            deltas = step()
            seconds = time.perf_counter() - start
            if len(deltas) == BATCH:
                shares.append((spent[0] - before) / seconds)
                steps.append(seconds)
            return deltas

        core.step = timed_step  # type: ignore[method-assign]
        measure(core, prompts, tokens)
    core.step = step  # type: ignore[method-assign]
    name = f"scheduling and input preparation of a {median(steps) * 1e3:.1f} ms step"
    return Figure(name, median(shares) * 100, "%", 5.0, False)


@contextmanager
def _timed(methods: tuple[tuple[type, str], ...]) -> Iterator[list[float]]:
    """The seconds spent in these methods, as a list of one running sum."""
    spent = [0.0]

    def timed(method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                spent[0] += time.perf_counter() - start

        return call

    originals = [(owner, name, getattr(owner, name)) for owner, name in methods]
    for owner, name, method in originals:
        setattr(owner, name, timed(method))
    try:
        yield spent
    finally:
        for owner, name, method in originals:
            setattr(owner, name, method)


def serving_memory() -> Figure:
    """Peak resident memory of `hotplug serve`, all processes, under a load that fills the KV cache."""
    server = Served("smollm2", "--dtype", "float32", "--quantization", "none", "--kv-cache-memory", KV_CACHE)
    try:
        prompts = random_prompts(1000, LOAD_REQUESTS, LOAD_PROMPT, seed=0)
        load = Load(url=server.url, api_key=None, model="smollm2", prompts=prompts, output_len=8, concurrency=BATCH)
        outcome = asyncio.run(drive(load))
        if outcome.errors:
            raise SystemExit(f"requests failed: {dict(outcome.errors)}")
        processes, peak = len(server.processes), server.peak_rss()
    finally:
        server.stop()
    return Figure(f"peak memory while serving, KV cache {KV_CACHE}, {processes} processes", peak / 2**30, "GiB", 3.0,
                  False)  # fmt: skip


if __name__ == "__main__":
    main()
