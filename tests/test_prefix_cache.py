"""Block hashes and the search for cached prefixes."""

from __future__ import annotations

import numpy as np
import pytest
from kv_groups import one_group
from scheduler_fakes import FakeEngine

from hotplug.core.kv.manager import KVManager, Prefix
from hotplug.core.kv.prefix import BlockHashes


def digests(tokens: list[int], salt: str = "", block_size: int = 4) -> list[bytes]:
    return BlockHashes(block_size, salt).extend(np.array(tokens, np.int32), len(tokens) // block_size)


def filled(tokens: list[int], window: int | None = None) -> KVManager:
    """A manager whose cache holds `tokens`, released."""
    group = one_group(4, window)
    kv = KVManager(group, num_pages=17, max_num_seqs=2, max_model_len=64)
    kv.extend(np.array([0], np.int32), np.array([len(tokens)], np.int32))
    kv.register(0, digests(tokens), len(tokens) // 4)
    kv.free(0)
    return kv


def test_equal_prefixes_have_equal_hashes_and_only_full_blocks_have_one() -> None:
    a, b = digests([1, 2, 3, 4, 5, 6, 7, 8, 9]), digests([1, 2, 3, 4, 5, 6, 7, 0])
    assert len(a) == len(b) == 2
    assert a[0] == b[0] and a[1] != b[1]


def test_equal_blocks_behind_different_heads_have_different_hashes() -> None:
    assert digests([1, 2, 3, 4, 5, 6, 7, 8])[1] != digests([0, 2, 3, 4, 5, 6, 7, 8])[1]


def test_salts_separate_tenants() -> None:
    assert digests([1, 2, 3, 4], "a") != digests([1, 2, 3, 4], "b")


def test_hashes_grow_with_the_sequence() -> None:
    tokens = np.arange(12, dtype=np.int32)
    hashes = BlockHashes(4)
    hashes.extend(tokens, 1)
    hashes.extend(tokens, 3)
    assert hashes.digests == digests(tokens.tolist())


def test_the_longest_cached_prefix_is_found() -> None:
    kv = filled(list(range(12)))
    assert kv.match(digests([*range(8), 0, 0, 0, 0])).num_blocks == 2
    assert kv.match(digests([9] * 8)) == Prefix(0, ([[]],))


def test_an_evicted_tail_leaves_the_head_usable() -> None:
    kv = filled(list(range(12)))
    kv.pool.allocate(14)  # 13 hold nothing, the last is the prefix's tail
    assert kv.match(digests(list(range(12)))).num_blocks == 2


def test_with_a_window_only_the_blocks_it_sees_must_be_cached() -> None:
    kv, hashes = filled(list(range(12)), window=4), digests(list(range(12)))
    middle, tail = kv.pool.lookup(hashes[1]), kv.pool.lookup(hashes[2])
    kv.pool.share([middle, tail])
    kv.pool.allocate(14)
    assert kv.pool.lookup(hashes[0]) is None
    # The next query, at 12, sees 9 .. 12; the one at 8 sees 5 .. 8.
    assert kv.match(hashes) == Prefix(3, ([[tail]],))
    assert kv.match(hashes[:2]) == Prefix(2, ([[middle]],))
    assert kv.match(hashes[:1]).num_blocks == 0


def test_a_second_request_computes_only_what_is_new() -> None:
    engine = FakeEngine()
    engine.add(list(range(10)), max_tokens=1)
    engine.run()
    engine.add([*range(8), 30, 31], max_tokens=1)
    engine.run()
    engine.check_outputs()
    assert engine.device.computed_tokens == 10 + 2
    assert engine.deltas[-1].num_cached_tokens == 8
    stats = engine.scheduler.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (20, 8)


def test_at_least_one_prompt_token_is_computed() -> None:
    engine = FakeEngine()
    for _ in range(2):
        engine.add(list(range(8)), max_tokens=1)
        engine.run()
    assert engine.deltas[-1].num_cached_tokens == 4


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_generated_tokens_are_cached_too(depth: int) -> None:
    engine = FakeEngine(depth=depth)
    name = engine.add([1, 2, 3], max_tokens=10)
    engine.run()
    engine.add([1, 2, 3, *engine.outputs[name], 5], max_tokens=1)
    engine.run()
    assert engine.deltas[-1].num_cached_tokens == 12


def test_the_block_of_a_last_token_that_was_never_computed_is_not_cached() -> None:
    engine = FakeEngine()
    name = engine.add([1, 2, 3], max_tokens=9)
    engine.run()
    engine.add([1, 2, 3, *engine.outputs[name], 5], max_tokens=1)
    engine.run()
    engine.check_outputs()
    assert engine.deltas[-1].num_cached_tokens == 8


def test_another_salt_shares_nothing() -> None:
    engine = FakeEngine()
    for salt in ("a", "b"):
        engine.add(list(range(10)), salt=salt, max_tokens=1)
        engine.run()
    assert engine.deltas[-1].num_cached_tokens == 0
    engine.check_outputs()


@pytest.mark.parametrize("depth", [0, 1])
def test_requests_that_arrive_together_compute_their_shared_prefix_once(depth: int) -> None:
    engine = FakeEngine(num_blocks=400, max_num_seqs=16, max_num_batched_tokens=1024, max_model_len=600, depth=depth)
    prefix = [i % 37 for i in range(512)]
    for i in range(16):
        engine.add([*prefix, i], max_tokens=4)
    plan = engine.step()
    assert plan is not None and plan.total_tokens == 513 + 15
    engine.run()
    engine.check_outputs()


def test_a_prompt_with_logprobs_is_computed_in_full() -> None:
    engine = FakeEngine()
    for logprobs in (None, 0):
        engine.add(list(range(10)), max_tokens=1, prompt_logprobs=logprobs)
        engine.run()
    assert engine.device.computed_tokens == 20


def test_switched_off_it_shares_nothing() -> None:
    engine = FakeEngine(prefix_cache=False)
    for _ in range(2):
        engine.add(list(range(10)), max_tokens=8)
        engine.run()
    assert engine.device.computed_tokens == 2 * 17
    assert engine.scheduler.stats().prefix_queries == 0
