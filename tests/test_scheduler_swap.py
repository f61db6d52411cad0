"""Preemption by swap: what the scheduler plans, one behaviour a test. Random lives are in test_scheduler_properties."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scheduler_fakes import FakeEngine

from hotplug.core.kv.prefix import BlockHashes
from hotplug.core.scheduler.policy import PRIORITY


def prompt(n: int, first: int = 0) -> list[int]:
    return [first] + [1] * (n - 1)


def crowded(depth: int = 0, *, num_host_blocks: int = 9, **options: object) -> FakeEngine:
    """Two requests that together outgrow the pool; the second, r1, is the one to be preempted."""
    engine = FakeEngine(num_blocks=8, depth=depth, num_host_blocks=num_host_blocks, **options)  # type: ignore[arg-type]
    for i in range(2):
        engine.add(prompt(8, first=i), max_tokens=12)
    return engine


def until_preempted(engine: FakeEngine) -> None:
    while not engine.scheduler.stats().preemptions:
        engine.step()


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_swapped_request_computes_nothing_twice(depth: int, prefix_cache: bool) -> None:
    engine = crowded(depth, prefix_cache=prefix_cache)
    engine.run()
    engine.check_outputs()
    stats = engine.scheduler.stats()
    assert stats.preemptions == 1 and stats.blocks_swapped_out > 0
    assert engine.device.computed_tokens == 2 * (8 + 12 - 1)


def test_without_swap_space_it_computes_what_is_not_cached_again() -> None:
    engine = crowded(num_host_blocks=0, prefix_cache=False)
    engine.run()
    engine.check_outputs()
    assert engine.scheduler.stats().preemptions == 1
    assert engine.device.computed_tokens > 2 * (8 + 12 - 1)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_it_comes_back_with_its_last_token_alone_to_compute(depth: int) -> None:
    engine = crowded(depth)
    until_preempted(engine)
    plan = None
    while plan is None or not plan.admitted:
        plan = engine.step()
    (admission,) = plan.admitted
    i = plan.rows.tolist().index(admission.row)
    assert (plan.start[i], plan.num_tokens[i]) == (len(admission.token_ids) - 1, 1)
    assert plan.samples[i] and plan.swap_in


def test_copies_out_go_with_the_plan_that_reuses_the_blocks() -> None:
    engine, plan = crowded(prefix_cache=False), None
    while plan is None or not plan.swap_out:
        blocks = set(engine.kv.tables[0].pages[0, 1].tolist()) - {0}
        plan = engine.step()
    assert {block for block, _ in plan.swap_out} == blocks
    assert blocks & set(plan.block_ids.tolist())


def test_a_prefix_still_cached_on_the_device_is_shared_and_not_copied() -> None:
    engine = crowded()
    until_preempted(engine)
    engine.abort("r0")  # nothing was evicted yet but what r0 grew into
    engine.run()
    engine.check_outputs()
    stats = engine.scheduler.stats()
    assert stats.blocks_swapped_out == 3 and stats.blocks_swapped_in < 3


def test_of_a_window_the_cached_blocks_are_shared_and_the_others_copied() -> None:
    engine = FakeEngine(
        num_blocks=13, block_size=2, window=8, num_host_blocks=9, policy=PRIORITY, max_num_seqs=1,
        max_num_batched_tokens=16,
    )  # fmt: skip
    tokens = list(range(20))
    engine.add(tokens, max_tokens=4, priority=1)
    engine.step()
    engine.step()
    # It finds 16 tokens cached, and what it takes beyond evicts the two last of the four blocks in the window.
    engine.add(tokens[:16] + [1] * 15, max_tokens=2, priority=0)
    engine.run()
    engine.check_outputs()
    stats = engine.scheduler.stats()
    assert (stats.preemptions, stats.blocks_swapped_out, stats.blocks_swapped_in) == (1, 4, 2)


def test_what_came_back_can_be_shared_again() -> None:
    engine = FakeEngine(num_blocks=7, num_host_blocks=20, policy=PRIORITY, max_num_seqs=2, max_num_batched_tokens=24)
    engine.add(prompt(12), max_tokens=8, priority=1)
    engine.step()
    engine.add(prompt(20, first=2), max_tokens=2, priority=0)  # evicts the other's whole prefix
    while not engine.scheduler.stats().blocks_swapped_in:
        engine.step()
    engine.add([*prompt(12), 3], max_tokens=1)
    engine.run()
    engine.check_outputs()
    assert [d.num_cached_tokens for d in engine.deltas if d.request_id == "r2"] == [12]


def test_a_block_whose_tokens_are_still_in_flight_has_no_hash() -> None:
    engine = FakeEngine(num_blocks=25, block_size=1, depth=2, num_host_blocks=30)
    for i in range(2):
        engine.add(prompt(8, first=i), max_tokens=12)
    until_preempted(engine)
    sequence = engine.scheduler.state.requests["r1"]
    assert sequence.swapped is not None and sequence.in_flight
    while engine.pending:
        engine.update()
    tokens = np.array([*prompt(8, first=1), *engine.outputs["r1"]], np.int32)
    found = sequence.hashes.digests
    assert len(found) < sequence.swapped.num_tokens
    assert found == BlockHashes(1).extend(tokens, len(found))


def test_a_prefix_that_requests_share_is_copied_once() -> None:
    engine = FakeEngine(num_blocks=9, num_host_blocks=30, max_num_seqs=3, max_num_batched_tokens=64)
    for i in range(3):
        engine.add([1] * 12 + [2 + i], max_tokens=18)
    engine.run()
    engine.check_outputs()
    stats = engine.scheduler.stats()
    # Three blocks of the prefix, and what each preempted request has of its own.
    assert stats.preemptions >= 2
    assert stats.blocks_swapped_out <= 3 + 5 * stats.preemptions


def test_a_second_swap_copies_only_what_is_new() -> None:
    engine = FakeEngine(num_blocks=11, num_host_blocks=30, policy=PRIORITY, max_num_seqs=2, max_num_batched_tokens=64)
    engine.add(prompt(24), max_tokens=14, priority=1)
    engine.step()
    copied = []
    for i in range(2):
        engine.add(prompt(30, first=2 + i), max_tokens=2, priority=0)
        before = engine.scheduler.stats().blocks_swapped_out
        for _ in range(4):
            engine.step()
        copied.append(engine.scheduler.stats().blocks_swapped_out - before)
    engine.run()
    engine.check_outputs()
    assert engine.scheduler.stats().preemptions == 2
    assert copied[0] >= 6 and copied[1] <= 2


def test_a_full_host_pool_falls_back_to_recompute() -> None:
    engine = crowded(num_host_blocks=2, prefix_cache=False)
    engine.run()
    engine.check_outputs()
    stats = engine.scheduler.stats()
    assert (stats.preemptions, stats.blocks_swapped_out, stats.blocks_swapped_in) == (1, 0, 0)


@pytest.mark.parametrize("depth", [0, 2])
def test_aborting_a_swapped_request_frees_its_host_blocks(depth: int) -> None:
    engine = crowded(depth)
    until_preempted(engine)
    assert engine.scheduler.stats().host_blocks_used > 0
    assert engine.abort("r1")
    assert engine.scheduler.stats().host_blocks_used == 0
    engine.run()
    engine.check_outputs()


def test_a_request_that_ends_by_a_late_token_while_swapped_frees_its_host_blocks() -> None:
    engine = FakeEngine(num_blocks=8, depth=2, num_host_blocks=9)
    engine.add(prompt(8), max_tokens=20)
    engine.add(prompt(8, first=1), max_tokens=6)
    until_preempted(engine)
    assert engine.scheduler.stats().host_blocks_used > 0
    engine.run()
    engine.check_outputs()


def test_a_partial_prefill_resumes_where_it_was() -> None:
    engine = FakeEngine(num_blocks=13, num_host_blocks=20, policy=PRIORITY, prefix_cache=False)
    engine.add(prompt(40), max_tokens=2, priority=1, prompt_logprobs=0)
    engine.step()
    engine.step()
    engine.add(prompt(30, first=2), max_tokens=2, priority=0)
    engine.run()
    engine.check_outputs()
    assert engine.scheduler.stats().preemptions == 1
    assert engine.device.computed_tokens == 40 + 1 + 30 + 1


def test_a_longer_prefix_in_the_cache_beats_what_is_on_the_host() -> None:
    engine = FakeEngine(num_blocks=13, num_host_blocks=20, policy=PRIORITY, max_num_seqs=1, max_num_batched_tokens=8)
    engine.add(prompt(40), max_tokens=2, priority=1)
    engine.step()
    engine.add([*prompt(40), 3], max_tokens=2, priority=0)
    engine.run()
    engine.check_outputs()
    stats = engine.scheduler.stats()
    assert (stats.preemptions, stats.blocks_swapped_in) == (1, 0)
    assert engine.device.computed_tokens == 8 + (41 - 8 + 1) + (40 - 36 + 1)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("num_host_blocks", [12, 200])
def test_a_pool_that_is_always_too_small_loses_no_request(depth: int, window: int | None, num_host_blocks: int) -> None:
    engine = FakeEngine(
        num_blocks=17, block_size=2, window=window, depth=depth, max_num_seqs=8, num_host_blocks=num_host_blocks
    )
    rng = random.Random(depth)
    for i in range(40):
        engine.add([rng.randrange(4) for _ in range(rng.randint(1, 20))], priority=i % 3, max_tokens=rng.randint(4, 20))
    engine.run()
    engine.check_outputs()
    assert window or engine.scheduler.stats().blocks_swapped_in > 0
