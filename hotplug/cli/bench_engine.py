"""Measurements of an engine in this process: token ids in, token ids out, no text and no sockets.

`hotplug bench latency|throughput` and ci/bench use them; printing is `bench.py`'s.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from hotplug.core.engine.core import EngineCore
from hotplug.core.errors import HotplugError
from hotplug.core.request import Request, SamplingParams
from hotplug.core.tools.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Run:
    """One measured run, in seconds and tokens. `gaps` are those between the tokens of each request."""

    seconds: float
    ttft: float
    """Until the first token of the first request."""
    gaps: list[float]
    prompt_tokens: int
    output_tokens: int


def random_prompts(vocab_size: int, count: int, length: int, seed: int) -> list[list[int]]:
    """Prompts of random token ids; the same for the same seed."""
    draw = random.Random(seed)
    return [[draw.randrange(vocab_size) for _ in range(length)] for _ in range(count)]


def measure(
    core: EngineCore, prompts: Sequence[list[int]], output_len: int | Sequence[int], timeline: Timeline | None = None
) -> Run:
    """Run prompts at once to `output_len` greedy tokens, of all or of each. Raises RequestError if they do not fit.

    `timeline` records the run; it costs some microseconds a step and half of one a token.
    """
    core.timer.recorder = timeline
    lengths = [output_len] * len(prompts) if isinstance(output_len, int) else output_len
    last: dict[str, float] = {}
    gaps: list[float] = []
    ttft = tokens = 0.0
    start = time.perf_counter()
    for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        sampling = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
        request = Request(id=f"bench-{i}", prompt_token_ids=prompt, sampling=sampling, arrival=time.monotonic())
        if timeline is not None:
            timeline.added(request.id, len(prompt))
        core.add(request)
    while core.has_work:
        deltas = core.step()
        now = time.perf_counter()
        for delta in deltas:
            if delta.finish_reason == "error":
                raise HotplugError("a request failed", why=delta.error)
            count = len(delta.token_ids)
            if delta.request_id in last:  # tokens that come together share the time since the last ones
                gaps += [(now - last[delta.request_id]) / count] * count
            last[delta.request_id] = now
            tokens += count
            ttft = ttft or now - start
            if timeline is not None:
                timeline.output(delta)
        core.timer.sent()
        if timeline is not None:
            timeline.counters(core.stats())
    return Run(time.perf_counter() - start, ttft, gaps, sum(map(len, prompts)), int(tokens))


def latency_figures(runs: Sequence[Run]) -> dict[str, float]:
    """Medians over runs of one request: milliseconds, and output tokens a second after the first."""
    itl = [median(r.gaps) for r in runs if r.gaps]
    figures = {"ttft_ms": median(r.ttft for r in runs) * 1e3}
    if itl:
        figures["itl_ms"] = median(itl) * 1e3
        figures["decode_tokens_per_s"] = median(decode_rate(r) for r in runs)
    figures["total_ms"] = median(r.seconds for r in runs) * 1e3
    return figures


def throughput_figures(runs: Sequence[Run], num_requests: int) -> dict[str, float]:
    """Medians over runs of many requests at once, all per second of the whole run."""
    seconds = median(r.seconds for r in runs)
    return {
        "output_tokens_per_s": runs[0].output_tokens / seconds,
        "total_tokens_per_s": (runs[0].output_tokens + runs[0].prompt_tokens) / seconds,
        "requests_per_s": num_requests / seconds,
        "seconds": seconds,
    }


def speculation_figures(core: EngineCore) -> dict[str, float]:
    """What became of all proposals since the engine's start; nothing without any."""
    stats = core.stats()
    if not stats.verifications:
        return {}
    return {
        "speculative_acceptance": stats.accepted_tokens / stats.proposed_tokens,
        "tokens_per_verification": 1 + stats.accepted_tokens / stats.verifications,
    }


def decode_rate(run: Run) -> float:
    """Output tokens a second after the first token."""
    return (run.output_tokens - 1) / (run.seconds - run.ttft)
