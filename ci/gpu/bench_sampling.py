"""Sampling and input preparation on a GPU: each kernel against its reference, then its time. Under 30 s.

python ci/gpu/bench_sampling.py [vocab]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hotplug.core.ops import inputs, sampling
from hotplug.platforms.cuda.kernels.inputs import prepare_step
from hotplug.platforms.cuda.kernels.sample import sample_rows

DEVICE = torch.device("cuda")
REPEATS = 200
READS = 4.2e12
"""Bytes a second that an H200 reads."""


def captured(call: Callable[[], Any]) -> float:
    """Microseconds of a call within a CUDA graph of ten, the median of some replays."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            call()
    times = []
    for _ in range(REPEATS // 10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 100)
    return sorted(times)[len(times) // 2]


def state(rows: int, temperature: float, top_k: int, top_p: float, min_p: float) -> dict[str, Tensor]:
    """Parameters of as many batch rows, all alike but for their seeds."""
    return {
        "temperature": torch.full((rows,), temperature, device=DEVICE),
        "top_k": torch.full((rows,), top_k, device=DEVICE),
        "top_p": torch.full((rows,), top_p, device=DEVICE),
        "min_p": torch.full((rows,), min_p, device=DEVICE),
        "seeds": torch.arange(rows, device=DEVICE) * 7919,
    }


def time_draws(name: str, entries: int, vocab: int, spread: float, *filters: float) -> None:
    """Check and time one mixture of rows that are alike."""
    torch.manual_seed(entries)
    logits = torch.randn((entries, vocab), device=DEVICE) * spread
    rows = torch.randperm(entries, device=DEVICE).to(torch.int32)
    counters = torch.arange(entries, device=DEVICE)
    params = state(entries, *filters)  # type: ignore[arg-type]
    same, count = 0, 0
    for _ in range(max(256 // entries, 1)):
        same += int((sample_rows(logits, rows, **params, counters=counters)
                     == sampling.sample_rows(logits, rows, **params, counters=counters)).sum())  # fmt: skip
        count += entries
        counters += entries
    # in a flat top-p the reference's own float32 running sum is a few of the tens of thousands of tokens off
    least = 1.0 if filters[0] == 0 else 0.75 if "flat" in name else 0.98
    if same < count * least:
        raise SystemExit(f"{name}, {entries} rows: only {same} of {count} tokens are the reference's")
    took = captured(lambda: sample_rows(logits, rows, **params, counters=counters))
    once = entries * vocab * 4 / READS * 1e6
    print(f"{name:24} {entries:5} {took:9.1f} {once:9.1f} {same / count:9.2%}", flush=True)


def time_inputs(name: str, queries: int, requests: int, context: int) -> None:
    index = {"dtype": torch.int32, "device": DEVICE}
    blocks = -(-context // 16)
    args = (
        torch.full((queries * requests,), -1, **index), torch.randperm(requests, device=DEVICE).to(torch.int32),
        torch.arange(requests + 1, **index) * queries, torch.full((requests,), context - queries, **index),
        torch.arange(requests, **index), torch.randint(1, 9999, (requests, 2 * blocks), **index),
    )  # fmt: skip
    kernel = partial(prepare_step, *args, blocks, block_size=16)
    for got, want in zip(kernel(), inputs.prepare_step(*args, 16, blocks), strict=True):
        if not torch.equal(got, want):
            raise SystemExit(f"{name}, {requests} requests: not the reference's")
    took = captured(kernel)
    print(f"{name:24} {requests:5} {took:9.1f} {requests * blocks * 8 / READS * 1e6:9.1f}", flush=True)


def main(vocab: int) -> None:
    print(f"{torch.cuda.get_device_name()}, vocabulary {vocab}; microseconds in a graph, and what reading once takes")
    print(f"{'':24} {'rows':>5} {'us':>9} {'roofline':>9} {'equal':>9}")
    for entries in (1, 64, 256):
        logits = torch.randn((entries, vocab), device=DEVICE)
        took = captured(lambda logits=logits: logits.argmax(-1))
        print(f"{'torch argmax':24} {entries:5} {took:9.1f}", flush=True)
        time_draws("greedy", entries, vocab, 3.0, 0.0, 0, 1.0, 0.0)
        time_draws("temperature", entries, vocab, 3.0, 1.0, 0, 1.0, 0.0)
        time_draws("top-k 50", entries, vocab, 3.0, 1.0, 50, 1.0, 0.0)
        time_draws("top-p 0.9, peaked", entries, vocab, 8.0, 0.8, 0, 0.9, 0.0)
        time_draws("top-k, top-p, min-p", entries, vocab, 3.0, 0.8, 50, 0.9, 0.05)
        time_draws("min-p 0.05", entries, vocab, 3.0, 1.0, 0, 1.0, 0.05)
        time_draws("top-p 0.9, flat", entries, vocab, 1.0, 1.0, 0, 0.9, 0.0)
    time_inputs("inputs, decodes", 1, 1, 2048)
    time_inputs("inputs, decodes", 1, 256, 2048)
    time_inputs("inputs, decodes", 1, 8, 32000)
    time_inputs("inputs, chunks", 512, 16, 4096)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 128256)
