"""Random requests through a server: nothing fails that should not, nothing is left behind, nothing drifts.

    python ci/bench/soak.py [MODEL] [--requests 500] [--exec MODE] [ARGUMENTS OF hotplug serve]

Prompts of 1 to 2,000 tokens with mixed sampling parameters, streamed or not; some clients go away at a random moment,
some requests are bad. Holds the server to this, and exits 1 where it does not keep it:

- every answer is whole, refused as it must be, or its client had gone;
- the server logs no failure, and its processes live;
- at the end no request and no KV block is held, and no file or thread more than before;
- memory does not drift: after --settle requests, the last quarter's median is within --growth of the first's;
- greedy requests give the same tokens before and after.

The KV cache is small on purpose: requests are preempted and cached prefixes evicted all the time.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
import psutil
from prompts import PROMPTS
from served import Served
from soak_requests import Case, cases

from hotplug.core.text.tokenizer_files import load_tokenizer
from hotplug.core.weights.source import resolve

MIB = 2**20
PROBES, PROBE_TOKENS = 3, 48


@dataclass
class Outcome:
    """What has come of the requests so far."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)
    """Bytes, after each request."""
    prompt_tokens: int = 0
    output_tokens: int = 0


async def send(client: httpx2.AsyncClient, case: Case, outcome: Outcome) -> None:
    """Send one request and check what comes."""
    try:
        async with asyncio.timeout(case.leave_after):
            if case.stream:
                await _stream(client, case, outcome)
            else:
                answer = await _post(client, case)
                _check_whole(case, answer.status_code, answer.json(), outcome)
    except TimeoutError:
        outcome.counts["left"] += 1
    except (httpx2.HTTPError, ValueError, KeyError, AssertionError) as e:
        outcome.faults.append(f"{type(e).__name__}: {e}: {case.content[:300]}")


async def _post(client: httpx2.AsyncClient, case: Case) -> httpx2.Response:
    return await client.post(case.path, content=case.content, headers={"Content-Type": "application/json"})


def _check_whole(case: Case, status: int, body: Any, outcome: Outcome) -> None:
    assert status == case.status, f"status {status}, not {case.status}: {body}"
    if status != 200:
        assert body["error"]["message"]
        outcome.counts["refused"] += 1
        return
    assert [choice["index"] for choice in body["choices"]] == list(range(case.choices))
    _check_ends(case, [choice["finish_reason"] for choice in body["choices"]], body["usage"], outcome)


async def _stream(client: httpx2.AsyncClient, case: Case, outcome: Outcome) -> None:
    reasons: dict[int, str] = {}
    usage, events, done = None, 0, False
    headers = {"Content-Type": "application/json"}
    async with client.stream("POST", case.path, content=case.content, headers=headers) as answer:
        assert answer.status_code == 200, f"status {answer.status_code}: {await answer.aread()!r}"
        async for line in answer.aiter_lines():
            if events == case.leave_at:
                outcome.counts["left"] += 1
                return
            if not line:
                continue
            assert line.startswith("data: ") and not done, f"not an event: {line}"
            events += 1
            if done := line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, f"an error in the stream: {event}"
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                assert choice["index"] not in reasons, "a choice goes on after its end"
                if choice["finish_reason"] is not None:
                    reasons[choice["index"]] = choice["finish_reason"]
    assert done and usage is not None, "the stream is not whole"
    assert sorted(reasons) == list(range(case.choices)), f"choices that ended: {sorted(reasons)}"
    _check_ends(case, list(reasons.values()), usage, outcome)


def _check_ends(case: Case, reasons: list[str], usage: dict[str, int], outcome: Outcome) -> None:
    assert set(reasons) <= {"stop", "length"}, f"finish reasons {reasons}"
    tokens = usage["completion_tokens"]
    assert case.least * case.choices <= tokens <= case.most * case.choices, (
        f"{tokens} tokens, not {case.least} to {case.most} in each of {case.choices} choices"
    )
    outcome.prompt_tokens += usage["prompt_tokens"]
    outcome.output_tokens += tokens
    outcome.counts["answered"] += 1


async def load(server: Served, requests: Iterator[Case], args: argparse.Namespace, outcome: Outcome) -> None:
    """Send all requests, `args.concurrency` at a time. Raises TimeoutError when none ends for too long."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=args.concurrency)
    async with httpx2.AsyncClient(base_url=server.url, timeout=None, limits=limits) as client:

        async def work() -> None:
            for case in requests:
                await send(client, case, outcome)
                outcome.rss.append(server.rss())

        workers = [asyncio.create_task(work()) for _ in range(args.concurrency)]
        try:
            while pending := [worker for worker in workers if not worker.done()]:
                ended = len(outcome.rss)
                await asyncio.wait(pending, timeout=args.patience)
                if len(outcome.rss) == ended and not all(worker.done() for worker in pending):
                    raise TimeoutError(f"no request has ended for {args.patience:.0f} s")
            for worker in workers:
                worker.result()  # raises what it has met
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


def greedy(server: Served, model: str) -> list[str]:
    """What a few greedy requests answer, one after the other."""
    answers = []
    for prompt in PROMPTS[:PROBES]:
        body = {"model": model, "prompt": prompt, "max_tokens": PROBE_TOKENS, "temperature": 0, "ignore_eos": True}
        answer = httpx2.post(f"{server.url}/v1/completions", json=body, timeout=600)
        answers.append(answer.raise_for_status().json()["choices"][0]["text"])
    return answers


def held(server: Served) -> dict[str, int]:
    """Open files and threads of the server's processes."""
    return {"open files": sum(p.num_fds() for p in server.processes),
            "threads": sum(p.num_threads() for p in server.processes)}  # fmt: skip


def drift(rss: list[int]) -> int:
    """Bytes by which memory grew, from the first quarter's median to the last's: single large steps come and go."""
    quarter = max(1, len(rss) // 4)
    return int(median(rss[-quarter:]) - median(rss[:quarter]))


def soak(args: argparse.Namespace, server: Served, vocab: int) -> tuple[Outcome, dict[str, Any]]:
    """The whole run against a server that has just started."""
    name = args.model
    plan = httpx2.get(f"{server.url}/debug/plan", timeout=60).json()
    first, outcome = greedy(server, name), Outcome()
    requests = cases(name, vocab, plan["max_model_len"], args.requests, longest=args.longest, seed=args.seed)
    begin = time.perf_counter()
    asyncio.run(load(server, itertools.islice(requests, args.settle), args, outcome))
    before = held(server)
    asyncio.run(load(server, requests, args, outcome))
    seconds = time.perf_counter() - begin
    fault = outcome.faults.append
    try:
        server.until_idle(60)
    except TimeoutError as e:
        fault(str(e))
    if usage := server.metric("hotplug_kv_cache_usage_ratio"):
        fault(f"{usage:.1%} of the KV blocks are held by nobody's request")
    for what, count in held(server).items():
        if count > before[what] + args.concurrency:  # connections that are kept alive, and threads of pools
            fault(f"{count - before[what]} {what} more than after {args.settle} requests")
    growth = drift(outcome.rss[args.settle :])
    if growth > args.growth * MIB:
        fault(f"memory grew by {growth / MIB:.0f} MiB after {args.settle} requests, allowed are {args.growth}")
    if (last := greedy(server, name)) != first:
        fault(f"greedy requests answer {last}, and before the load {first}")
    if sum(outcome.counts.values()) + len(outcome.faults) < args.requests:
        fault(f"of {args.requests} requests only {sum(outcome.counts.values())} are accounted for")
    counters = ("prefix_cache_queries", "prefix_cache_hits", "preemptions")
    figures = {
        "exec": plan["exec"], "plan_hash": plan["plan_hash"], "requests": dict(outcome.counts),
        "seconds": round(seconds, 1), "prompt_tokens": outcome.prompt_tokens, "output_tokens": outcome.output_tokens,
        "rss_mib": {"median": median(outcome.rss) // MIB, "peak": max(outcome.rss) // MIB, "growth": growth // MIB},
        **{name: int(server.metric(f"hotplug_{name}_total")) for name in counters},
    }  # fmt: skip
    return outcome, figures


def failures_logged(log: Path) -> list[str]:
    """Lines of the server's log that tell of a failure."""
    return [line for line in log.read_text().splitlines() if "ERROR" in line or "Traceback" in line][:5]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2", help="a source that hotplug serves")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--longest", type=int, default=2000, help="tokens of the longest prompt")
    parser.add_argument("--concurrency", type=int, default=24, help="requests on the way at once")
    parser.add_argument("--patience", type=float, default=300, help="seconds in which one request at least ends")
    parser.add_argument("--settle", type=int, default=100, help="requests until memory must be flat; fewer than all")
    parser.add_argument("--growth", type=int, default=64, help="MiB by which it may grow after that")
    parser.add_argument("--kv-cache-memory", default="192MiB")
    parser.add_argument("--max-num-seqs", default="12")
    parser.add_argument("--exec", default="auto", help="how the server runs its steps")
    parser.add_argument("--seed", type=int, default=0)
    args, serve = parser.parse_known_args()
    vocab = load_tokenizer(resolve(args.model)).vocab_size
    with tempfile.NamedTemporaryFile("w", prefix="soak-", suffix=".log") as log:
        server = Served(
            args.model, "--exec", args.exec, "--kv-cache-memory", args.kv_cache_memory,
            "--scheduling", "priority", "--max-num-seqs", args.max_num_seqs, *serve, log=log,
        )  # fmt: skip
        try:
            outcome, figures = soak(args, server, vocab)
        except (httpx2.HTTPError, psutil.Error, TimeoutError) as e:
            raise SystemExit(f"the server is gone or hangs: {e}\n{Path(log.name).read_text()[-3000:]}") from e
        finally:
            code = server.stop()
        if code:
            outcome.faults.append(f"the server ended with code {code}")
        outcome.faults += failures_logged(Path(log.name))
    print(json.dumps({"schema": 1, "benchmark": "soak", "model": args.model, **figures}))
    for fault in outcome.faults:
        print(fault, file=sys.stderr)
    sys.exit(bool(outcome.faults))


if __name__ == "__main__":
    main()
