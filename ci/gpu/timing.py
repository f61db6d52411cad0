"""Timing on the GPU: graph replays over inputs that rotate past the L2 cache, and compiling ahead in many processes."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

L2_BYTES = 64 << 20


def copies_past_l2(size: int) -> int:
    """How many tensors of `size` bytes to rotate among, so that none is still in the cache when it comes round."""
    return max(min(-(-3 * L2_BYTES // max(size, 1)), 64), 1)


def graph_time(calls: Sequence[Callable[[], Any]], *, least: float = 2e-3, repeats: int = 5) -> float:
    """Microseconds of one of `calls`, recorded one after the other in a graph; the median of `repeats` replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        calls[0]()
        end.record()
        torch.cuda.synchronize()
        rounds = max(1, min(int(least * 1e3 / max(begin.elapsed_time(end), 1e-3) / len(calls)), 200 // len(calls) + 1))
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        for _ in range(rounds):
            for call in calls:
                call()
        graph.capture_end()
        graph.replay()
        times = []
        for _ in range(repeats):
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / (rounds * len(calls)))
    return statistics.median(times)


def compile_ahead(task: Callable[[Any], None], items: Sequence[Any], workers: int = 14) -> None:
    """Run `task(item)` for every item in processes of their own, so that what they compile lies in Triton's cache.

    A task that raises is left to fail where its kernel is timed.
    """
    workers = min(workers, os.cpu_count() or 1, max(len(items) // 4, 1))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(task, item) for item in items]:
            future.exception()
