"""Scheduling policies: a package's own, and what the scheduler refuses of one."""

from __future__ import annotations

from pathlib import Path

import pytest
from plugin_examples import activate
from scheduler_fakes import FakeEngine

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.errors import RequestError
from hotplug.core.request import Request, SamplingParams


class Ranked:
    """Ranks by a function of the request."""

    def __init__(self, rank, *, preempts=False):
        self.rank = rank
        self.preempts = preempts


def test_the_lowest_rank_starts_first_and_equal_ones_in_order() -> None:
    engine = FakeEngine(policy=Ranked(lambda r: len(r.prompt_token_ids)), max_num_seqs=1)
    for prompt in ([1, 1], [2], [3]):
        engine.add(prompt, max_tokens=1)
    started = []
    while engine.scheduler.has_work:
        started += [a.token_ids[0] for a in engine.step().admitted]
    assert started == [2, 3, 1]


def test_only_a_policy_that_preempts_takes_rows() -> None:
    for preempts in (False, True):
        engine = FakeEngine(policy=Ranked(lambda r: len(r.prompt_token_ids), preempts=preempts), max_num_seqs=1)
        engine.add([1, 1], max_tokens=5)
        engine.step()
        engine.add([2], max_tokens=1)
        engine.step()
        assert engine.scheduler.stats().preemptions == int(preempts)


@pytest.mark.parametrize("rank", [float("nan"), float("inf"), "first", None])
def test_a_rank_that_cannot_be_ordered_refuses_the_request(rank: object) -> None:
    engine = FakeEngine(policy=Ranked(lambda r: rank), max_num_seqs=1)
    with pytest.raises(RequestError, match="policy Ranked ranks the request"):
        engine.add([1], max_tokens=1)
    assert not engine.scheduler.has_work


def test_a_policy_that_raises_refuses_the_request_and_harms_no_other() -> None:
    engine = FakeEngine(policy=Ranked(lambda r: 1 / (len(r.prompt_token_ids) - 1)), max_num_seqs=1)
    with pytest.raises(RequestError, match="fails on the request: ZeroDivisionError"):
        engine.add([1], max_tokens=1)
    engine.add([1, 2], max_tokens=1)
    engine.run()


def test_a_policy_sees_when_a_request_came_though_nobody_said() -> None:
    seen = []
    engine = FakeEngine(policy=Ranked(lambda r: seen.append(r.arrival) or 0), max_num_seqs=1)
    engine.add([1], max_tokens=1)
    assert seen[0] > 0


def test_an_installed_policy_orders_an_engines_requests(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    activate(monkeypatch, "extras")
    core = EngineCore(
        EngineConfig(model=str(tiny_model), load_format="dummy", device="cpu", kv_cache_memory="4MiB",
                     max_num_seqs=1, scheduling="shortest-first")
    )  # fmt: skip
    params = SamplingParams(max_tokens=1, temperature=0.0)
    for name, length in (("long", 40), ("short", 2), ("middle", 9)):
        core.add(Request(id=name, prompt_token_ids=[5] * length, sampling=params, arrival=100.0))
    finished = []
    while core.has_work:
        finished += [delta.request_id for delta in core.step()]
    assert finished == ["short", "middle", "long"]
