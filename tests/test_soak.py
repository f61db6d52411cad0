"""Random requests through a server of a very small model, in every mode of the CPU platform; `make soak` for more."""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
import soak
from soak_requests import BAD, Case, cases

from hotplug.platforms.cpu import CpuPlatform

SOAK = Path(__file__).parent.parent / "ci" / "bench" / "soak.py"
MODES = CpuPlatform().limits(CpuPlatform().probe()[0]).exec_modes


@pytest.mark.parametrize("mode", MODES)
def test_sixty_random_requests_leave_nothing_behind(tiny_model: Path, mode: str) -> None:
    command = [sys.executable, str(SOAK), str(tiny_model), "--requests", "60", "--settle", "30", "--exec", mode,
               "--kv-cache-memory", "560KiB", "--max-num-seqs", "32", "--concurrency", "60",
               "--load-format", "dummy"]  # fmt: skip
    preempted = 0
    for _ in range(3):  # who meets whom is the machine's to decide
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
        assert done.returncode == 0, done.stderr + done.stdout
        figures = json.loads(done.stdout)
        assert figures["exec"] == mode
        assert sum(figures["requests"].values()) == 60
        assert figures["prefix_cache_hits"] > 0
        preempted += figures["preemptions"]
        if preempted:
            break
    assert preempted


def test_requests_are_of_every_kind_and_the_same_for_a_seed() -> None:
    def make() -> list[object]:
        return list(cases("tiny", 258, 2048, 500, longest=2000, seed=0))

    made = make()
    assert made == make()
    assert len({case.status for case in made}) == len({200, *(status for _, status in BAD)})
    prompts = [json.loads(c.content).get("prompt") for c in made if c.status == 200]
    lengths = [len(prompt) for prompt in prompts if isinstance(prompt, list)]
    assert min(lengths) == 1 and max(lengths) > 1800
    assert sum(case.stream for case in made) > 150
    assert sum(case.leaves for case in made) > 50
    assert any(case.leave_at is not None for case in made) and any(case.leave_after is not None for case in made)


def event(**choice: object) -> str:
    return "data: " + json.dumps({"choices": [{"index": 0, "finish_reason": None, **choice}]}) + "\n\n"


END = event(finish_reason="length")
USAGE = 'data: {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": %d}}\n\n'
DONE = "data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("status", "text", "fault"),
    [
        (200, event() + END + USAGE % 4 + DONE, ""),
        (200, event() + END + USAGE % 4, "the stream is not whole"),
        (200, event() + USAGE % 4 + DONE, "choices that ended: []"),
        (200, event() + END + event() + USAGE % 4 + DONE, "goes on after its end"),
        (200, event() + event(finish_reason="error") + USAGE % 4 + DONE, "finish reasons ['error']"),
        (200, event() + 'data: {"error": {"message": "dead"}}\n\n', "an error in the stream"),
        (200, event() + END + USAGE % 3 + DONE, "3 tokens, not 4 to 4"),
        (500, "oh", "status 500"),
    ],
)
def test_a_stream_that_is_not_what_was_asked_for_is_a_fault(status: int, text: str, fault: str) -> None:
    outcome, case = soak.Outcome(), Case("/v1/completions", "{}", stream=True, most=4, least=4)

    async def ask() -> None:
        answers = httpx2.MockTransport(lambda request: httpx2.Response(status, text=text))
        async with httpx2.AsyncClient(transport=answers, base_url="http://soak") as client:
            await soak.send(client, case, outcome)

    asyncio.run(ask())
    if fault:
        assert fault in outcome.faults[0]
    else:
        assert (outcome.faults, outcome.counts) == ([], {"answered": 1})


def test_a_server_that_hangs_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*args: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(soak, "send", never)
    server = SimpleNamespace(url="http://soak", rss=lambda: 0)
    args = argparse.Namespace(concurrency=2, patience=0.05)
    with pytest.raises(TimeoutError, match="no request has ended"):
        asyncio.run(soak.load(server, iter(["a", "b"]), args, soak.Outcome()))


def test_memory_that_comes_and_goes_is_no_drift_and_what_stays_is() -> None:
    assert soak.drift([100, 900, *[100] * 8, 950, 100]) == 0
    assert soak.drift([100 + 10 * i for i in range(8)]) == 60
