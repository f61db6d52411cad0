"""An open-loop load against an OpenAI-compatible server: `python -m peers.load OPTIONS`.

OPTIONS is JSON: url, model, rate (requests a second), seconds, seed, processes, and for a small model most and
vocabulary (`chat_load.requests`). Streamed `/v1/completions` of chat-like lengths are sent when their time has come,
however long the others take. The plan is dealt to several processes in turn, so that none is too slow to send in time
or to note when an event came. Prints {"requests", "errors": [..], "tokens", "events", "seconds", "first_ms": [..],
"gap_ms": [..], "late_ms": [..]}: a first token a request, a gap an event after it, and how late each was sent.

Tokens are counted here: each request asks for a number of tokens, ends only with it, and one whose server counts
another number, or that ends in any other way, is an error.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import sys
import time
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import aiohttp

from peers.chat_load import LAST_TOKEN, Asked, requests

LEAD = 0.3
"""Seconds from when all sending processes are there to the start, so that all of them know it."""
READY = 60.0
"""Seconds that they may take to be there."""
TIMEOUT = aiohttp.ClientTimeout(total=600)


@dataclass
class Seen:
    """What clients saw. Times in milliseconds."""

    requests: int = 0
    tokens: int = 0
    events: int = 0
    last: float = 0.0
    """When the last event came, on the clock that all processes share."""
    errors: list[str] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)
    gap_ms: list[float] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)


async def stream(session: aiohttp.ClientSession, url: str, model: str, asked: Asked, seen: Seen) -> None:
    """Send one request and note its events. Raises RuntimeError where it does not end with what it asked for."""
    body = {
        "model": model, "prompt": asked.prompt, "max_tokens": asked.outputs, "min_tokens": asked.outputs,
        "ignore_eos": True, "temperature": 0.0, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    begin, times, counted, rest = time.perf_counter(), [], 0, b""
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        if answer.status != 200:
            raise RuntimeError(f"status {answer.status}: {(await answer.text())[:120]}")
        async for data in answer.content.iter_any():
            now = time.perf_counter()
            *events, rest = (rest + data).split(b"\n\n")
            for event in events:
                if not event.startswith(b"data: {"):
                    continue
                if b'"error"' in event or b'"usage":{' in event or b'"usage": {' in event:
                    document = json.loads(event[6:])
                    if "error" in document:
                        raise RuntimeError(f"in the stream: {str(document['error'])[:120]}")
                    counted = (document.get("usage") or {}).get("completion_tokens", counted)
                    if not document["choices"]:
                        continue
                times.append(now)
    if counted != asked.outputs or not times:
        raise RuntimeError(f"{counted} tokens in {len(times)} events instead of {asked.outputs} tokens")
    seen.tokens += counted
    seen.events += len(times)
    seen.last = max(seen.last, times[-1])
    seen.first_ms.append((times[0] - begin) * 1e3)
    seen.gap_ms += [(b - a) * 1e3 for a, b in pairwise(times)]


async def send(url: str, model: str, part: list[Asked], begin: float) -> Seen:
    """Send each of `part` at its time after `begin` of the shared clock."""
    seen = Seen(requests=len(part))

    async def one(session: aiohttp.ClientSession, asked: Asked) -> None:
        try:
            await stream(session, url, model, asked, seen)
        except (RuntimeError, aiohttp.ClientError, TimeoutError) as e:
            seen.errors.append(str(e) or type(e).__name__)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=TIMEOUT) as session:
        tasks = []
        for asked in part:
            await asyncio.sleep(max(0.0, begin + asked.at - time.perf_counter()))
            seen.late_ms.append((time.perf_counter() - begin - asked.at) * 1e3)
            tasks.append(asyncio.create_task(one(session, asked)))
        await asyncio.gather(*tasks)
    return seen


def _process(url: str, model: str, part: list[Asked], ready: Any, starts: Any, results: Any) -> None:
    ready.release()
    results.put(asyncio.run(send(url, model, part, starts.get())))


def run(
    url: str, model: str, rate: float, seconds: float, seed: int = 7, processes: int = 2, most: int = 0,
    vocabulary: int = LAST_TOKEN,
) -> dict[str, Any]:  # fmt: skip
    """What all clients saw together. `perf_counter` is one clock for all processes of a Linux machine."""
    plan = list(requests(rate, seconds, seed, most, vocabulary))
    if not plan:
        raise ValueError(f"no request falls into {seconds} s at {rate} a second")
    context = multiprocessing.get_context("spawn")
    ready, starts, results = context.Semaphore(0), context.Queue(), context.Queue()
    senders = [
        context.Process(target=_process, args=(url, model, plan[i::processes], ready, starts, results))
        for i in range(min(processes, len(plan)))
    ]
    try:
        for sender in senders:
            sender.start()
        for _ in senders:
            if not ready.acquire(timeout=READY):
                raise RuntimeError("the processes that send the load did not start")
        begin = time.perf_counter() + LEAD
        for _ in senders:
            starts.put(begin)
        parts: list[Seen] = [results.get(timeout=seconds + 700) for _ in senders]
    finally:
        for sender in senders:
            sender.kill()
            sender.join()
    return together(parts, begin)


def together(parts: list[Seen], begin: float) -> dict[str, Any]:
    """One document of what several processes saw; "seconds" run from the start to the last event."""
    whole = Seen()
    for part in parts:
        whole.requests += part.requests
        whole.tokens += part.tokens
        whole.events += part.events
        whole.last = max(whole.last, part.last)
        for name in ("errors", "first_ms", "gap_ms", "late_ms"):
            getattr(whole, name).extend(getattr(part, name))
    found = asdict(whole)
    found["seconds"] = found.pop("last") - begin
    return found


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of all are not above."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def load_figures(found: dict[str, Any]) -> dict[str, float]:
    """The figures of a load that had no error. Raises RuntimeError where it had one."""
    if found["errors"]:
        raise RuntimeError(f"{len(found['errors'])} of {found['requests']} requests failed: {found['errors'][0]}")
    return {
        "out tok/s": found["tokens"] / found["seconds"],
        "first token p50": percentile(found["first_ms"], 0.5),
        "first token p99": percentile(found["first_ms"], 0.99),
        "gap p50": percentile(found["gap_ms"], 0.5),
        "gap p99": percentile(found["gap_ms"], 0.99),
        "tokens an event": found["tokens"] / found["events"],
        "late p99": percentile(found["late_ms"], 0.99),
    }


def main() -> None:
    print(json.dumps(run(**json.loads(sys.argv[1]))))


if __name__ == "__main__":
    main()
