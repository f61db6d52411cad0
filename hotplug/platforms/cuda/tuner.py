"""The tuner: candidates of each kernel and shape, timed as graph replays over inputs that leave the L2 cache behind."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, zip_longest
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hotplug.platforms.cuda.tuning import Case, Config, Key, Tunable, Tuned, read, write, wrong
from hotplug.vendor import PlatformError, SiteSpec, TuningResult, TuningSummary

GAIN = 0.02
"""Share by which a candidate must be faster than what is in use: less is noise."""

MOST_SETS = 16
"""Sets of inputs at most; small ones stay in the L2 cache then, as activations do in a step."""

Timer = Callable[[Sequence[Callable[[], Any]]], float]
"""Microseconds a call, of calls that run one after the other."""


def tune(
    tunables: Iterable[Tunable],
    sites: Sequence[SiteSpec],
    *,
    device: torch.device,
    device_name: str,
    seconds: float,
    report: Callable[[TuningResult], None],
    output: Path,
    timer: Timer,
    cache_bytes: int,
    compile_ahead: Callable[[Key, Sequence[Config]], None] = lambda key, configs: None,
    clock: Callable[[], float] = time.monotonic,
) -> TuningSummary:
    """Measure what serves `sites` until `seconds` are over, and write `output` after each result.

    `compile_ahead` gets the candidates of a key before they are run, to compile them side by side.

    Entries of `output` that are not measured stay. Raises PlatformError where no kernel of these sites is tunable.
    """
    jobs = list(_in_turn([(tunable, key) for key in tunable.keys(sites)] for tunable in tunables))
    if not jobs:
        raise PlatformError("no kernel that serves this model has configurations to choose from", where=device_name)
    known = Tuned.load(device_name)
    entries = read(output) if output.exists() else {}
    end = clock() + seconds
    measured = 0
    for tunable, key in jobs:
        if clock() >= end:
            break
        before = known.lookup(key.kernel, key.dtype, **dict(key.shape)) or tunable.default(key)
        tried = [before, *(c for c in tunable.candidates(key) if dict(c) != dict(before))]
        compile_ahead(key, tried)
        result = _tune_one(tunable, key, tried, device, timer, cache_bytes, lambda: clock() >= end)
        entries[key] = dict(result.after)
        write(output, device_name, entries)
        report(result)
        measured += 1
    return TuningSummary(file=output, measured=measured, left=len(jobs) - measured)


def _in_turn(lists: Iterable[list[tuple[Tunable, Key]]]) -> Iterator[tuple[Tunable, Key]]:
    """One of each kernel in turn, so that a budget that ends early has something of all."""
    return (job for job in chain.from_iterable(zip_longest(*lists)) if job is not None)


def _tune_one(
    tunable: Tunable, key: Key, tried: Sequence[Config], device: torch.device, timer: Timer, cache_bytes: int,
    over: Callable[[], bool],
) -> TuningResult:  # fmt: skip
    """The fastest of `tried`, of which the first is in use."""
    cases = [tunable.make(key, device)]
    sets = min(max(-(-2 * cache_bytes // max(cases[0].num_bytes, 1)), 2), MOST_SETS)
    cases += [tunable.make(key, device) for _ in range(sets - 1)]
    expected = cases[0].reference()
    rejected: list[str] = []
    times: dict[int, float] = {}
    for i, config in enumerate(tried):
        if i and over():
            break
        fault = _fault(cases[0], config, expected, key.dtype)
        if fault:
            rejected.append(f"{dict(config)}: {fault}")
        else:
            times[i] = timer([_call(case, config) for case in cases])
    if not times:
        raise PlatformError("a kernel fails with every configuration", where=f"{key}", why=rejected[0])
    best = min(times, key=lambda i: times[i])
    before = times.get(0)
    if before is not None and times[best] > before * (1 - GAIN):
        best = 0
    return TuningResult(
        kernel=key.kernel, dtype=key.dtype, shape=dict(key.shape), before=dict(tried[0]), after=dict(tried[best]),
        before_us=before, after_us=times[best], candidates=len(times), rejected=tuple(rejected),
    )  # fmt: skip


def _call(case: Case, config: Config) -> Callable[[], Any]:
    return lambda: case.run(config)


def _fault(case: Case, config: Config, expected: Any, dtype: str) -> str:
    try:
        return wrong(case.run(config), expected, dtype)
    except Exception as e:  # too much shared memory, too many registers: a compiler may refuse in any way
        return f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"


def graph_time(calls: Sequence[Callable[[], Any]], replays: int = 9) -> float:
    """Microseconds a call: the median of replays of a CUDA graph that holds all of them, over and over for 3 ms."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def elapsed(run: Callable[[], Any]) -> float:
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1000

    def all_calls() -> None:
        for call in calls:
            call()

    all_calls()  # compiles, and makes what is made on first use
    rounds = max(1, min(int(3000 / max(elapsed(all_calls), 1)), 256 // len(calls)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            all_calls()
    graph.replay()
    return median(elapsed(graph.replay) for _ in range(replays)) / (rounds * len(calls))


class CompileAhead:
    """Compiles candidates side by side, in processes of their own that leave them in Triton's cache on disk.

    A candidate that fails there is left to fail where it is measured.
    """

    def __init__(self, device: torch.device, workers: int = 12) -> None:
        self._device = device
        self._pool = ProcessPoolExecutor(min(workers, os.cpu_count() or 1), mp_context=get_context("spawn"))

    def __call__(self, key: Key, configs: Sequence[Config]) -> None:
        tasks = [self._pool.submit(run_once, key, dict(config), self._device) for config in configs]
        for task in tasks:
            task.exception()

    def __enter__(self) -> CompileAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def run_once(key: Key, config: dict[str, Any], device: torch.device) -> None:
    """Run a kernel of the platform with a configuration. Called in other processes."""
    from hotplug.platforms.cuda.kernels import TUNABLES

    (tunable,) = (tunable for tunable in TUNABLES if tunable.kernel == key.kernel)
    tunable.make(key, device).run(config)
