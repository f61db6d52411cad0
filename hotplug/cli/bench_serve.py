"""A closed loop of streamed completions against a running server: what its clients see.

Each of `concurrency` workers sends its next request when the last has ended.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2

from hotplug.core.errors import HotplugError

_TIMEOUT = httpx2.Timeout(600.0, connect=10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to send, and how."""

    url: str
    api_key: str | None
    model: str
    prompts: list[list[int]]
    output_len: int
    concurrency: int


@dataclass(slots=True)
class Outcome:
    """What the clients saw; seconds."""

    seconds: float = 0.0
    ttfts: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    output_tokens: int = 0
    completed: int = 0
    errors: Counter[str] = field(default_factory=Counter)


def server_info(url: str, api_key: str | None) -> tuple[str, dict[str, Any]]:
    """The name of the served model and its plan. Raises HotplugError when the server does not answer so."""
    with httpx2.Client(base_url=url, headers=_headers(api_key), timeout=_TIMEOUT, trust_env=False) as client:
        try:
            models = client.get("/v1/models").raise_for_status().json()
            return models["data"][0]["id"], client.get("/debug/plan").raise_for_status().json()
        except httpx2.HTTPStatusError as e:
            raise HotplugError("the server refused", where=url, why=e.response.text[:300]) from e
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, KeyError, IndexError) as e:
            raise HotplugError("no hotplug server answers", where=url, why=str(e) or type(e).__name__,
                               hint="Start one with `hotplug serve`.") from e  # fmt: skip


async def drive(load: Load) -> Outcome:
    """Send every prompt, `concurrency` at a time. A failed request is counted by its reason, never retried."""
    outcome, waiting = Outcome(), iter(load.prompts)
    limits = httpx2.Limits(max_connections=load.concurrency, max_keepalive_connections=load.concurrency)
    async with httpx2.AsyncClient(
        base_url=load.url, headers=_headers(load.api_key), timeout=_TIMEOUT, limits=limits, trust_env=False
    ) as client:
        start = time.perf_counter()
        await asyncio.gather(*(_worker(client, load, waiting, outcome) for _ in range(load.concurrency)))
        outcome.seconds = time.perf_counter() - start
    return outcome


async def _worker(client: httpx2.AsyncClient, load: Load, prompts: Iterator[list[int]], outcome: Outcome) -> None:
    for prompt in prompts:
        try:
            await _request(client, load, prompt, outcome)
        except _FailedError as e:
            outcome.errors[str(e)] += 1
        except httpx2.HTTPError as e:
            outcome.errors[type(e).__name__] += 1


class _FailedError(Exception):
    """A request that the server answered with an error."""


async def _request(client: httpx2.AsyncClient, load: Load, prompt: list[int], outcome: Outcome) -> None:
    body = {
        "model": load.model, "prompt": prompt, "max_tokens": load.output_len, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    start = last = time.perf_counter()
    first, gaps, tokens = 0.0, [], 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            raise _FailedError(f"HTTP {response.status_code}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise _FailedError(f"in the stream: {event['error'].get('message', '')[:100]}")
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
            if event["choices"]:
                now = time.perf_counter()
                if first:
                    gaps.append(now - last)
                else:
                    first = now - start
                last = now
    outcome.ttfts.append(first)
    outcome.gaps += gaps
    outcome.output_tokens += tokens
    outcome.completed += 1


def serve_figures(outcome: Outcome) -> dict[str, float]:
    """Percentiles in milliseconds, rates per second, and the number of failed requests."""
    return {
        "ttft_p50_ms": percentile(outcome.ttfts, 50) * 1e3,
        "ttft_p99_ms": percentile(outcome.ttfts, 99) * 1e3,
        "itl_p50_ms": percentile(outcome.gaps, 50) * 1e3,
        "itl_p99_ms": percentile(outcome.gaps, 99) * 1e3,
        "output_tokens_per_s": outcome.output_tokens / outcome.seconds,
        "requests_per_s": outcome.completed / outcome.seconds,
        "errors": float(outcome.errors.total()),
    }


def percentile(values: list[float], percent: float) -> float:
    """By nearest rank; 0 of nothing."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def _headers(api_key: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {api_key}"} if api_key else {}
