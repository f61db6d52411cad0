"""Asynchronous devices: a step is launched before the tokens of the one before it are read, and nothing changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_platforms import FakePlatform, candidates, limits

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.request import Request, SamplingParams
from hotplug.plugins.conformance.engine_runs import small_model


class Event:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def record(self) -> None:
        self.log.append("record")

    def synchronize(self) -> None:
        self.log.append("wait")


@dataclass
class Runtime(FakePlatform):
    """Writes down when steps' tokens are on their way and when they are waited for."""

    facts: Any = field(default_factory=lambda: limits(asynchronous=True, shared_host_memory=True, accelerator=False))
    log: list[str] = field(default_factory=list)

    def set_device(self, device: Any) -> None: ...

    def stream(self) -> Any: ...

    def event(self) -> Event:
        return Event(self.log)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("models"))


@pytest.fixture
def start(model: Path) -> Callable[..., EngineCore]:
    def make(platform: Any, **options: Any) -> EngineCore:
        fixed = {"max_num_seqs": 4, "kv_cache_memory": "4MiB", "max_num_batched_tokens": 32}
        return EngineCore(EngineConfig(model=str(model), **{**fixed, **options}), candidates=candidates(platform))

    return make


def generate(core: EngineCore, *, length: int = 5, prompt_step: int = 11) -> dict[str, list[int]]:
    """Requests of different lengths, greedy and sampled, some ended by a stop token, one aborted on the way."""
    found: dict[str, list[int]] = {}
    for i in range(7):
        params = SamplingParams(temperature=float(i % 2), seed=i, max_tokens=length + 3 * i, ignore_eos=True,
                                stop_token_ids=tuple(range(0, 300, 7)) if i > 3 else (),
                                presence_penalty=0.5 * (i % 3))  # fmt: skip
        prompt = [(i * 31 + n * 7) % 290 + 1 for n in range(4 + prompt_step * i)]
        core.add(Request(id=str(i), prompt_token_ids=prompt, sampling=params))
    while core.has_work:
        for delta in core.step():
            found.setdefault(delta.request_id, []).extend(delta.token_ids)
    return found


@pytest.mark.parametrize("options", [{}, {"kv_cache_memory": 10 * 2 * 2 * 16 * 2 * 64 * 4}], ids=["roomy", "preempted"])
def test_tokens_are_those_of_steps_one_by_one(start, options):
    plain = start(FakePlatform(facts=limits(shared_host_memory=True, accelerator=False)), **options)
    ahead = start(Runtime(), **options)
    shape = {"length": 40, "prompt_step": 1} if options else {}
    assert generate(ahead, **shape) == generate(plain, **shape)
    if options:
        assert ahead.stats().preemptions > 0


def test_a_step_is_launched_before_the_one_before_is_waited_for(start):
    platform = Runtime()
    core = start(platform)
    platform.log.clear()
    generate(core)
    assert platform.log[:5] == ["record", "record", "wait", "record", "wait"]
    assert platform.log.count("record") == platform.log.count("wait")


def test_steps_in_flight_are_work_until_their_results_are_taken(start):
    core = start(Runtime())
    core.add(Request(id="a", prompt_token_ids=[1, 2], sampling=SamplingParams(max_tokens=1, ignore_eos=True)))
    assert not core.step()
    assert core.has_work
    assert [d.finish_reason for d in core.step()] == ["length"]
    while core.has_work:
        assert not core.step()


def test_aborting_with_a_step_in_flight_frees_everything(start):
    core = start(Runtime())
    core.add(Request(id="a", prompt_token_ids=[1, 2], sampling=SamplingParams(max_tokens=50, ignore_eos=True)))
    for _ in range(4):
        core.step()
    assert core.abort("a")
    while core.has_work:
        assert not core.step()
    assert core.stats().kv_blocks_used == 0


def test_without_a_runtime_results_still_come_one_step_later(start):
    facts = limits(asynchronous=True, shared_host_memory=True, accelerator=False)
    plain = FakePlatform(facts=limits(shared_host_memory=True, accelerator=False))
    assert generate(start(FakePlatform(facts=facts))) == generate(start(plain))
