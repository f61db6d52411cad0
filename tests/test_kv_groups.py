"""KV groups: which layers share tables, how pages serve them all, and that a scheduler over several is right."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kv_groups import groups_of, spec_of
from scheduler_fakes import FakeEngine

from hotplug.core.errors import ConfigError
from hotplug.core.kv.groups import MOST_WASTED, make_groups
from hotplug.core.kv.manager import KVManager
from hotplug.core.kv.spec import (
    BlockFormat,
    BlockTensor,
    KVSpec,
    LatentAttention,
    RecurrentState,
    SlidingWindow,
)
from hotplug.core.scheduler.policy import PRIORITY

FULL, NARROW, WIDE = spec_of(), spec_of(3), spec_of(9)
MIXES: dict[str, list[KVSpec]] = {
    "five of six slide": ([NARROW] * 5 + [FULL]) * 2,
    "every other": [WIDE, FULL] * 2,
    "two windows": [NARROW, WIDE, FULL],
    "windows alone": [NARROW, WIDE, WIDE],
}


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def sequence(kv: KVManager, row: int, tokens: int, chunk: int) -> int:
    """Let a row grow to `tokens` by chunks; the pages that it holds then."""
    for start in range(0, tokens, chunk):
        kv.trim(ints(row), ints(start))
        kv.extend(ints(row), ints(min(tokens, start + chunk)))
    kv.trim(ints(row), ints(tokens))
    kv.check()
    return kv.pool.num_used


# --- groups ---


def test_layers_with_equal_specs_form_a_group() -> None:
    groups = groups_of([NARROW, FULL, NARROW, WIDE], 4)
    assert [(group.spec, group.layers) for group in groups.groups] == [(NARROW, (0, 2)), (FULL, (1,)), (WIDE, (3,))]


def test_a_model_of_one_kind_has_a_lane_a_layer_and_one_table() -> None:
    groups = groups_of([FULL] * 5, 4)
    assert (groups.lanes, groups.num_tables) == (5, 1)
    assert [groups.lane_of[layer] for layer in range(5)] == list(range(5))


def test_a_larger_group_takes_several_pages_a_block() -> None:
    groups = groups_of(([NARROW] * 5 + [FULL]) * 2, 4)
    assert (groups.lanes, groups.num_tables) == (2, 6)
    assert [len(group.tables) for group in groups.groups] == [5, 1]


@given(st.lists(st.sampled_from([FULL, NARROW, WIDE]), min_size=1, max_size=40))
def test_every_layer_has_a_place_of_its_own_and_little_of_a_page_is_empty(specs: list[KVSpec]) -> None:
    groups = groups_of(specs, 4)
    places = {(groups.table_of[layer], groups.lane_of[layer]) for layer in range(len(specs))}
    assert len(places) == len(specs)
    for group in groups.groups:
        assert all(groups.table_of[layer] in group.tables for layer in group.layers)
        empty = len(group.tables) * groups.lanes - len(group.layers)
        assert empty * MOST_WASTED <= len(group.layers)


def test_models_without_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="one layer"):
        groups_of([], 4)


# --- specs ---


def test_a_latent_is_one_tensor_of_its_own_geometry() -> None:
    groups = make_groups([LatentAttention(width=576)] * 3, BlockFormat(16, "HND", "bfloat16"))
    assert groups.page == (1, BlockTensor((16, 576), "bfloat16"))
    assert groups.page_bytes == 3 * 16 * 576 * 2


def test_a_state_takes_one_block_whatever_the_length() -> None:
    state = RecurrentState(states=(BlockTensor((8, 4), "float32"), BlockTensor((3,), "float32")))
    groups = groups_of([state, FULL], 4)
    kv = KVManager(groups, num_pages=40, max_num_seqs=2, max_model_len=64)
    assert sequence(kv, 0, 40, 40) == 1 + 10
    assert sequence(kv, 0, 44, 4) == 1 + 11
    assert not kv.enable_prefix_cache, "a state holds all tokens of its sequence: no other can begin with it"


def test_kinds_of_different_sizes_share_pages_of_bytes() -> None:
    state = RecurrentState(states=(BlockTensor((5,), "float32"), BlockTensor((3,), "bfloat16")))
    groups = groups_of([state, FULL], 4)
    assert groups.views and groups.page == (1, BlockTensor((48,), "uint8"))
    assert groups.offsets(0) == [0, 32, 48] and groups.offsets(1) == [0, 16, 32]


@pytest.mark.parametrize("wrong", [{"num_kv_heads": 0}, {"head_dim": 0}, {"window": 0}])
def test_a_spec_of_nothing_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} must be at least 1"):
        SlidingWindow(**{"num_kv_heads": 1, "head_dim": 1, "window": 1, **wrong})


# --- memory ---


def test_windows_hold_what_they_see_and_the_rest_grows() -> None:
    """Of 12 layers 10 slide: at 4,000 tokens they hold their window, and the sequence a sixth of full attention's."""
    mixed = make_groups([spec_of(16) if layer % 6 else FULL for layer in range(12)], BlockFormat(4, "NHD", "float32"))
    full = groups_of([FULL] * 12, 4)
    sizes = {}
    for name, groups in (("mixed", mixed), ("full", full)):
        kv = KVManager(groups, num_pages=6000, max_num_seqs=1, max_model_len=4096)
        sizes[name] = sequence(kv, 0, 4000, 64) * groups.page_bytes
    blocks_in_window = 16 // 4
    assert sizes["mixed"] * 12 == sizes["full"] * 2 + 10 * blocks_in_window * full.page_bytes


@given(st.sampled_from([*MIXES.values()]), st.integers(1, 8), st.integers(1, 9), st.integers(1, 80))
def test_peak_pages_bound_what_a_sequence_ever_holds(specs: list[KVSpec], size: int, chunk: int, tokens: int) -> None:
    groups = groups_of(specs, size)
    kv = KVManager(groups, num_pages=1 + groups.peak_pages(tokens, chunk), max_num_seqs=1, max_model_len=80)
    sequence(kv, 0, tokens, chunk)  # or the pool would run out


@given(st.sampled_from([*MIXES.values()]), st.integers(1, 120), st.integers(1, 9))
def test_the_longest_sequence_fits_and_one_token_more_does_not(specs: list[KVSpec], pages: int, chunk: int) -> None:
    groups = groups_of(specs, 4)
    longest = groups.longest(pages, 400, chunk)
    assert longest == 0 or groups.peak_pages(longest, chunk) <= pages
    assert longest == 400 or groups.peak_pages(longest + 1, chunk) > pages


# --- the prefix cache ---


def test_a_prefix_is_found_where_every_group_has_what_the_next_query_reads() -> None:
    engine = FakeEngine(groups=groups_of(MIXES["five of six slide"], 4), num_blocks=200)
    engine.add(list(range(20)), max_tokens=1)
    engine.run()
    engine.add([*range(16), 30, 31], max_tokens=1)
    engine.run()
    engine.check_outputs()
    assert engine.deltas[-1].num_cached_tokens == 16


def test_a_prefix_whose_window_was_evicted_is_computed_from_where_both_groups_have_it() -> None:
    groups = groups_of([spec_of(4), FULL], 4)
    kv = KVManager(groups, num_pages=40, max_num_seqs=2, max_model_len=64)
    kv.extend(ints(0), ints(16))
    digests = [bytes([i]) * 16 for i in range(4)]
    kv.register(0, digests, 4)
    window = kv.tables[0].held(0, 0, 4)[0]
    kv.free(0)
    assert kv.match(digests).num_blocks == 4
    kv.pool.share([window[1], *kv.tables[1].held(0, 0, 0)[0]])
    kv.pool.forget([digests[3], digests[2]])  # the window's last two blocks
    assert kv.match(digests).num_blocks == 2


# --- the scheduler over several groups ---


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("host", [0, 80])
@pytest.mark.parametrize("depth", [0, 2])
def test_a_pool_that_is_always_too_small_loses_no_request(mix: str, host: int, depth: int) -> None:
    groups = groups_of(MIXES[mix], 2)
    engine = FakeEngine(
        groups=groups, num_blocks=2 + groups.peak_pages(40, 16), num_host_blocks=host, depth=depth, max_num_seqs=6,
        max_model_len=64,
    )  # fmt: skip
    for i in range(12):
        engine.add([i % 3] * (5 + i), max_tokens=12)
    engine.run()
    engine.check_outputs()
    assert engine.scheduler.stats().preemptions > 0


@pytest.mark.parametrize("mix", MIXES)
def test_swapped_sequences_come_back_in_every_group(mix: str) -> None:
    groups = groups_of(MIXES[mix], 2)
    engine = FakeEngine(groups=groups, num_blocks=400, num_host_blocks=200, policy=PRIORITY, max_num_seqs=1)
    engine.add(list(range(21)), max_tokens=20, priority=1)
    for _ in range(6):
        engine.step()
    engine.add([7, 8, 9], max_tokens=2, priority=0)
    engine.run()
    engine.check_outputs()
    stats = engine.scheduler.stats()
    assert stats.blocks_swapped_out > 0 and stats.blocks_swapped_in > 0
