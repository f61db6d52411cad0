"""A run of an engine as a timeline: host phases, steps on the device, requests, and what they hold.

While the engine runs, tuples are appended and nothing else; `write` makes of them what Perfetto
(https://ui.perfetto.dev) and chrome://tracing read: the JSON of the "Trace Event Format". Three tracks:

- host: a slice a step of the loop, and in it one a phase;
- device: an interval a step from its launch until the host has its tokens, which overlap where the next step is
  launched meanwhile;
- requests: an interval a request, and in it queue, prefill and decode.

Counters show requests that run and wait, and KV blocks in use.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter_ns
from typing import Any

from hotplug.core.request import EngineStats, TokenDelta
from hotplug.core.runner.timing import LAUNCH, PHASES, WAIT

_PID, _HOST, _DEVICE, _REQUESTS = 1, 1, 2, 3
_LEFT_OUT = "left out"


@dataclass(slots=True)
class _Request:
    """Nanoseconds of its turning points; 0 for what has not happened."""

    id: str
    prompt_tokens: int
    added: int
    scheduled: int = 0
    first_token: int = 0
    finished: int = 0
    output_tokens: int = 0
    reason: str | None = None


class Timeline:
    """Records one engine (`core.timer.recorder`). Past `limit` records of a kind, the rest are counted and left out."""

    def __init__(self, limit: int = 500_000) -> None:
        self._limit = limit
        self._laps: list[tuple[int, int, int]] = []
        self._steps: list[tuple[int, int]] = []
        self._launched: list[tuple[int, int]] = []
        self._counters: list[tuple[int, int, int, int]] = []
        self._requests: list[_Request] = []
        self._open: dict[str, _Request] = {}
        self.left_out = 0
        """Records beyond the capacity, which are dropped."""

    # --- what a step tells (hotplug.core.runner.timing.StepRecorder) ---

    def lap(self, phase: int, begin: int, end: int) -> None:
        if self._has_capacity(self._laps):
            self._laps.append((phase, begin, end))

    def launched(self, requests: int, tokens: int) -> None:
        if self._has_capacity(self._launched):
            self._launched.append((requests, tokens))

    def step(self, begin: int, end: int) -> None:
        if self._has_capacity(self._steps):
            self._steps.append((begin, end))

    # --- what the loop tells ---

    def added(self, request_id: str, prompt_tokens: int) -> None:
        """A request was given to the engine."""
        if self._has_capacity(self._requests):
            request = _Request(request_id, prompt_tokens, perf_counter_ns())
            self._requests.append(request)
            self._open[request_id] = request

    def output(self, delta: TokenDelta) -> None:
        """A request got tokens, or its end."""
        request = self._open.get(delta.request_id)
        if request is None:
            return
        now = perf_counter_ns()
        if not request.first_token:
            request.first_token, request.scheduled = now, min(now, request.added + round(1e9 * delta.queued))
        request.output_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            request.finished, request.reason = now, delta.finish_reason
            del self._open[delta.request_id]

    def counters(self, stats: EngineStats) -> None:
        """What the engine holds now."""
        if self._has_capacity(self._counters):
            self._counters.append((perf_counter_ns(), stats.running, stats.waiting, stats.kv_blocks_used))

    def _has_capacity(self, records: list[Any]) -> bool:
        if len(records) < self._limit:
            return True
        self.left_out += 1
        return False

    # --- the end ---

    def write(self, path: Path, facts: dict[str, Any]) -> None:
        """Write the trace with `facts` about the run. Raises OSError."""
        with path.open("w") as file:
            other = json.dumps({**facts, _LEFT_OUT: self.left_out})
            file.write(f'{{"displayTimeUnit": "ms", "otherData": {other}, "traceEvents": [\n')
            file.write(",\n".join(map(json.dumps, self.events())))
            file.write("\n]}\n")

    def events(self) -> Iterator[dict[str, Any]]:
        """All events of the trace; times in microseconds since the first record."""
        times = [*(begin for begin, _ in self._steps[:1]), *(request.added for request in self._requests[:1])]
        origin = min(times, default=0)
        yield from _names()
        for number, (begin, end) in enumerate(self._steps):
            yield _slice(f"step {number}", begin, end, origin)
        for phase, begin, end in self._laps:
            yield _slice(PHASES[phase], begin, end, origin)
        yield from self._device_events(origin)
        for number, request in enumerate(self._requests):
            yield from _request_events(number, request, origin)
        for at, running, waiting, blocks in self._counters:
            for name, values in (
                ("requests", {"running": running, "waiting": waiting}),
                ("KV blocks", {"used": blocks}),
            ):
                yield {"ph": "C", "name": name, "pid": _PID, "ts": _us(at, origin), "args": values}

    def _device_events(self, origin: int) -> Iterator[dict[str, Any]]:
        launches = [begin for phase, begin, _ in self._laps if phase == LAUNCH]
        arrivals = [end for phase, _, end in self._laps if phase == WAIT]
        # a step still in flight, or cut off at the limit, has no arrival
        for number, (launch, arrival, (requests, tokens)) in enumerate(
            zip(launches, arrivals, self._launched, strict=False)
        ):
            yield from _interval(
                "device", f"{tokens} tokens of {requests} requests", number, launch, arrival, origin, _DEVICE,
                {"step": number, "requests": requests, "tokens": tokens},
            )  # fmt: skip


def _names() -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": "process_name", "pid": _PID, "args": {"name": "hotplug"}}
    for tid, name in ((_HOST, "host"), (_DEVICE, "device"), (_REQUESTS, "requests")):
        yield {"ph": "M", "name": "thread_name", "pid": _PID, "tid": tid, "args": {"name": name}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": _PID, "tid": tid, "args": {"sort_index": tid}}


def _slice(name: str, begin: int, end: int, origin: int) -> dict[str, Any]:
    """A slice of the host's thread, which lies wholly inside or outside of any other."""
    return {"ph": "X", "cat": "host", "name": name, "pid": _PID, "tid": _HOST, "ts": _us(begin, origin),
            "dur": _us(end, begin)}  # fmt: skip


def _interval(
    category: str, name: str, number: int, begin: int, end: int, origin: int, tid: int, args: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """An interval that may overlap those of other numbers."""
    common = {"cat": category, "name": name, "id": number, "pid": _PID, "tid": tid}
    yield {"ph": "b", **common, "ts": _us(begin, origin), "args": args}
    yield {"ph": "e", **common, "ts": _us(end, origin)}


def _request_events(number: int, request: _Request, origin: int) -> Iterator[dict[str, Any]]:
    """A finished request: the whole around its parts, each opened and closed in the order of time."""
    if not request.finished:
        return
    args = {"id": request.id, "prompt_tokens": request.prompt_tokens, "output_tokens": request.output_tokens,
            "finish_reason": request.reason}  # fmt: skip
    whole = list(_interval("request", request.id, number, request.added, request.finished, origin, _REQUESTS, args))
    yield whole[0]
    for name, begin, end in (
        ("queue", request.added, request.scheduled),
        ("prefill", request.scheduled, request.first_token),
        ("decode", request.first_token, request.finished),
    ):
        yield from _interval("request", name, number, begin, end, origin, _REQUESTS, {})
    yield whole[1]


def _us(end: int, begin: int) -> float:
    return (end - begin) / 1e3
