"""The server's figures for Prometheus: an `EngineObserver` that a scrape reads.

Counts of requests are those of all front ends (`hotplug.server.figures`), the rest is what the engine last said.
Hot path: `inter_tokens` is called once a step, with 20,000 values a second and more, so histograms here are plain
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
from hotplug.server.figures import FINISH_REASONS, HISTOGRAMS, Figures


class Histogram:
    """A histogram of `hotplug.server.figures`: this process's values go in, those of all come out."""

    def __init__(self, figures: Figures, key: str, doc: str) -> None:
        self._figures = figures
        self._key = key
        self._doc = doc
        self._bounds = HISTOGRAMS[key]
        self._edges = np.array(self._bounds)
        cells = figures.own(key)
        self._counts, self._sum = cells[:-1], cells[-1:]

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def observe_all(self, values: Sequence[float]) -> None:
        array = np.asarray(values, np.float64)
        self._counts += np.bincount(np.searchsorted(self._edges, array), minlength=len(self._counts))
        self._sum += array.sum()

    def family(self) -> HistogramMetricFamily:
        *counts, total = self._figures.total(self._key)
        return _histogram(f"hotplug_{self._key}_seconds", self._doc, self._bounds, counts, total)


class EngineMetrics(Collector):
    """Implements `hotplug.core.client.observer.EngineObserver`; `registry` holds it for /metrics."""

    def __init__(self, figures: Figures | None = None) -> None:
        """`figures` are those of several front ends; None where there is one."""
        alone = figures is None
        self._figures = figures = Figures.alone() if figures is None else figures
        self._ttft = Histogram(figures, "time_to_first_token", "From a request's arrival to its first token")
        self._itl = Histogram(figures, "inter_token_latency", "Between the tokens of one request")
        self._queue = Histogram(figures, "queue_time", "From a request's arrival to its first step")
        self._duration = Histogram(figures, "request_duration", "From a request's arrival to its end")
        self._finished = figures.own("finished")
        self._stats: EngineStats | None = EngineStats() if alone else None
        self.registry = CollectorRegistry()
        self.registry.register(self)
        PlatformCollector(registry=self.registry)
        if alone:  # what these say is of one process
            ProcessCollector(registry=self.registry)
            GCCollector(registry=self.registry)

    @property
    def known(self) -> bool:
        """Whether the engine's counters are: a front end that took another's place must not show them as zero."""
        return self._stats is not None

    def first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def inter_token(self, seconds: float, tokens: int) -> None:
        """`tokens` arrived together, `seconds` after the one before them."""
        if tokens > 0:
            self._itl.observe(seconds / tokens, tokens)

    def inter_tokens(self, seconds: Sequence[float]) -> None:
        """One token each of several requests, and the time since its last."""
        self._itl.observe_all(seconds)

    def queued(self, seconds: float) -> None:
        self._queue.observe(seconds)

    def finished(self, reason: str, prompt_tokens: int, output_tokens: int, seconds: float) -> None:
        self._finished[FINISH_REASONS.index(reason)] += 1
        self._duration.observe(seconds)

    def stats(self, stats: EngineStats) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        for histogram in (self._ttft, self._itl, self._queue, self._duration):
            yield histogram.family()
        stats = self._stats or EngineStats()
        usage = _ratio(stats.kv_blocks_used, stats.kv_blocks_total)
        swap_usage = _ratio(stats.host_blocks_used, stats.host_blocks_total)
        for name, doc, value in (
            ("requests_running", "Requests in the batch", stats.running),
            ("requests_waiting", "Requests in the queue", stats.waiting),
            ("requests_waiting_for_kv", "Requests whose KV blocks are on their way", stats.waiting_for_kv),
            ("kv_cache_usage_ratio", "Share of KV cache blocks in use", usage),
            ("swap_space_usage_ratio", "Share of host blocks that hold KV of preempted requests", swap_usage),
            (
                "speculative_acceptance_ratio",
                "Share of proposed tokens that were accepted, since start",
                _ratio(stats.accepted_tokens, stats.proposed_tokens),
            ),
            (
                "speculative_tokens_per_verification",
                "Tokens that a decode with proposals gave on average, since start",
                _ratio(stats.verifications + stats.accepted_tokens, stats.verifications),
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
            ("speculative_accepted_tokens", "Proposed tokens that the model accepted", stats.accepted_tokens),
            ("unplanned_recompiles", "Step shapes compiled while serving, beyond those planned", stats.recompiles),
        ):
            yield CounterMetricFamily(f"hotplug_{name}", doc, total)
        yield from _steps(stats)
        finished = CounterMetricFamily("hotplug_requests_finished", "Requests that ended", labels=["reason"])
        for reason, total in zip(FINISH_REASONS, self._figures.total("finished"), strict=True):
            finished.add_metric([reason], total)
        yield finished
        [restarts] = self._figures.total("restarts")
        yield CounterMetricFamily("hotplug_frontend_restarts", "Front ends that died and were replaced", restarts)


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
