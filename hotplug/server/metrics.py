"""The engine's figures for Prometheus: an `EngineObserver` that a scrape reads.

Hot path: `inter_tokens` is called once a step, with 20,000 times a second and more, so histograms here are plain
arrays that become Prometheus families only when someone scrapes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from hotplug.core.request import EngineStats
from hotplug.core.runner.timing import PHASES, STEP_SECONDS

_TTFT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_INTER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_QUEUE = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_DURATION = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Histogram:
    """Counts of values below each bound, and their sum."""

    def __init__(self, name: str, doc: str, bounds: Sequence[float]) -> None:
        self.name = name
        self.doc = doc
        self._bounds = bounds
        self._edges = np.array(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def observe_all(self, values: Sequence[float]) -> None:
        array = np.asarray(values, np.float64)
        found = np.bincount(np.searchsorted(self._edges, array), minlength=len(self._counts))
        for place in np.flatnonzero(found).tolist():
            self._counts[place] += int(found[place])
        self._sum += float(array.sum())

    def family(self) -> HistogramMetricFamily:
        return _histogram(self.name, self.doc, self._bounds, self._counts, self._sum)


class EngineMetrics(Collector):
    """Implements `hotplug.core.engine.observer.EngineObserver`; `registry` holds it for /metrics."""

    def __init__(self) -> None:
        self._ttft = Histogram(
            "hotplug_time_to_first_token_seconds", "From a request's arrival to its first token", _TTFT
        )
        self._itl = Histogram("hotplug_inter_token_latency_seconds", "Between the tokens of one request", _INTER_TOKEN)
        self._queue = Histogram("hotplug_queue_time_seconds", "From a request's arrival to its first step", _QUEUE)
        self._duration = Histogram("hotplug_request_duration_seconds", "From a request's arrival to its end", _DURATION)
        self._finished: dict[str, int] = {}
        self._stats = EngineStats()
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def inter_token(self, seconds: float, tokens: int) -> None:
        """`tokens` arrived together, `seconds` after the one before them."""
        if tokens > 0:
            self._itl.observe(seconds / tokens, tokens)

    def inter_tokens(self, seconds: Sequence[float]) -> None:
        self._itl.observe_all(seconds)

    def queued(self, seconds: float) -> None:
        self._queue.observe(seconds)

    def finished(self, reason: str, prompt_tokens: int, output_tokens: int, seconds: float) -> None:
        self._finished[reason] = self._finished.get(reason, 0) + 1
        self._duration.observe(seconds)

    def stats(self, stats: EngineStats) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        for histogram in (self._ttft, self._itl, self._queue, self._duration):
            yield histogram.family()
        stats = self._stats
        usage = _ratio(stats.kv_blocks_used, stats.kv_blocks_total)
        swap_usage = _ratio(stats.host_blocks_used, stats.host_blocks_total)
        for name, doc, value in (
            ("requests_running", "Requests in the batch", stats.running),
            ("requests_waiting", "Requests in the queue", stats.waiting),
            ("kv_cache_usage_ratio", "Share of KV cache blocks in use", usage),
            ("swap_space_usage_ratio", "Share of host blocks that hold KV of preempted requests", swap_usage),
            (
                "speculative_acceptance_ratio",
                "Share of proposed tokens that were confirmed, since start",
                _ratio(stats.confirmed_tokens, stats.proposed_tokens),
            ),
            (
                "speculative_tokens_per_verification",
                "Tokens that a decode with proposals gave on average, since start",
                _ratio(stats.verifications + stats.confirmed_tokens, stats.verifications),
            ),
            ("reference_ops", "Call sites that run a reference op on an accelerator", stats.reference_ops),
        ):
            yield GaugeMetricFamily(f"hotplug_{name}", doc, value)
        for name, doc, total in (
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", stats.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache", stats.prefix_hits),
            ("preemptions", "Requests put back into the queue for want of KV blocks", stats.preemptions),
            ("kv_blocks_swapped_out", "KV blocks copied to the host for preempted requests", stats.blocks_swapped_out),
            ("kv_blocks_swapped_in", "KV blocks copied back to the device", stats.blocks_swapped_in),
            ("prompt_tokens", "Prompt tokens of requests that began to answer", stats.prompt_tokens),
            ("generation_tokens", "Tokens generated", stats.generated_tokens),
            ("speculative_verifications", "Decodes that verified proposed tokens", stats.verifications),
            ("speculative_proposed_tokens", "Tokens proposed by speculation", stats.proposed_tokens),
            ("speculative_confirmed_tokens", "Proposed tokens that the model confirmed", stats.confirmed_tokens),
            ("unplanned_recompiles", "Step shapes compiled while serving, beyond those planned", stats.recompiles),
        ):
            yield CounterMetricFamily(f"hotplug_{name}", doc, total)
        yield from _steps(stats)
        finished = CounterMetricFamily("hotplug_requests_finished", "Requests that ended", labels=["reason"])
        for reason, total in self._finished.items():
            finished.add_metric([reason], total)
        yield finished


def _histogram(
    name: str, doc: str, bounds: Sequence[float], counts: Sequence[float], total: float
) -> HistogramMetricFamily:
    """Counts up to each bound, and above, as what Prometheus reads; `total` is the sum of all values."""
    buckets = list(zip((*map(str, bounds), "+Inf"), accumulate(counts), strict=True))
    return HistogramMetricFamily(name, doc, buckets=buckets, sum_value=total)


def _steps(stats: EngineStats) -> Iterator[Metric]:
    """Where the engine's loop spends its time."""
    yield CounterMetricFamily("hotplug_steps", "Steps planned", stats.steps)
    phases = CounterMetricFamily(
        "hotplug_step_phase_seconds", "Time of the engine's loop by phase of a step", labels=["phase"]
    )
    nanoseconds = stats.phase_ns or [0] * len(PHASES)
    for phase, spent in zip(PHASES, nanoseconds, strict=True):
        phases.add_metric([phase], spent / 1e9)
    yield phases
    counts = stats.step_buckets or [0] * (len(STEP_SECONDS) + 1)
    doc = "Steps of the engine's loop, from planning to handing over"
    yield _histogram("hotplug_step_duration_seconds", doc, STEP_SECONDS, counts, sum(nanoseconds) / 1e9)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
