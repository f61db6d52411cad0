"""The block pool and the block tables over it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kv_groups import one_group

from hotplug.core.errors import ConfigError, OutOfMemoryError
from hotplug.core.kv.manager import KVManager
from hotplug.core.kv.pool import BlockPool


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def manager(num_blocks: int = 17, window: int | None = None) -> KVManager:
    group = one_group(4, window)
    return KVManager(group, num_pages=num_blocks, max_num_seqs=4, max_model_len=40)


def test_the_null_block_is_never_allocated() -> None:
    pool = BlockPool(5)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert (pool.num_free, pool.num_used) == (0, 4)


def test_a_pool_of_the_null_block_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 2 blocks"):
        BlockPool(1)


def test_asking_for_more_than_is_free_takes_nothing() -> None:
    pool = BlockPool(4)
    with pytest.raises(OutOfMemoryError, match="4 KV blocks asked for, 3 free"):
        pool.allocate(4)
    assert pool.num_free == 3


def test_a_shared_block_is_free_after_its_last_holder_released_it() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(1)
    pool.share(blocks)
    pool.release(blocks)
    assert pool.num_free == 2
    pool.release(blocks)
    assert pool.num_free == 3


def test_releasing_a_free_block_is_an_error() -> None:
    pool = BlockPool(4)
    with pytest.raises(ValueError, match="no reference"):
        pool.release([1])


def test_a_released_cached_block_is_found_until_it_is_allocated_anew() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.cache(block, b"a")
    pool.release([block])
    assert pool.lookup(b"a") == block
    assert pool.allocate(1) == [block]
    assert pool.lookup(b"a") is None


def test_blocks_without_cached_content_are_allocated_first() -> None:
    pool = BlockPool(4)
    a, b, c = pool.allocate(3)
    pool.cache(a, b"a")
    pool.release([a, b, c])
    assert set(pool.allocate(2)) == {b, c}
    assert pool.lookup(b"a") == a


def test_the_least_recently_released_cached_block_is_evicted_first() -> None:
    pool = BlockPool(3)
    a, b = pool.allocate(2)
    pool.cache(a, b"a")
    pool.cache(b, b"b")
    pool.release([b])
    pool.release([a])
    pool.share([b])
    pool.release([b])
    assert pool.allocate(1) == [a]


def test_the_tail_of_a_released_sequence_is_evicted_before_its_head() -> None:
    pool = BlockPool(3)
    head, tail = pool.allocate(2)
    pool.cache(head, b"head")
    pool.cache(tail, b"tail")
    pool.release([head, tail])
    assert pool.allocate(1) == [tail]


def test_the_first_block_of_a_hash_stays_the_cached_one() -> None:
    pool = BlockPool(3)
    a, b = pool.allocate(2)
    pool.cache(a, b"same")
    pool.cache(b, b"same")
    assert pool.lookup(b"same") == a
    pool.check()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=60))
def test_random_use_keeps_the_pool_consistent(script: list[tuple[int, int]]) -> None:
    pool = BlockPool(9)
    held: list[list[int]] = []
    for action, n in script:
        if action == 0 and n <= pool.num_free:
            held.append(pool.allocate(n))
        elif action == 1 and held:
            pool.release(held.pop(n % len(held)))
        elif action == 2 and (block := pool.lookup(bytes([n]))) is not None:
            pool.share([block])
            held.append([block])
        elif action == 3 and held and held[-1]:
            block = held[-1][0]
            if block not in pool._hash_of:
                pool.cache(block, bytes([n]))
        pool.check()
    assert pool.num_used == len({b for blocks in held for b in blocks})


# --- groups and tables ---


@pytest.mark.parametrize(("position", "first"), [(0, 0), (5, 0), (8, 0), (9, 1), (12, 1), (13, 2)])
def test_a_window_needs_the_blocks_its_query_still_sees(position: int, first: int) -> None:
    # A window of 6 at position 9 sees 4 .. 9: block 0 (positions 0 .. 3) is behind.
    assert one_group(4, 6).groups[0].first_needed(ints(position)).tolist() == [first]


def test_full_attention_needs_every_block() -> None:
    assert one_group(4).groups[0].first_needed(ints(1000)).tolist() == [0]


@given(st.integers(1, 8), st.integers(1, 20), st.integers(1, 9), st.integers(1, 80))
def test_peak_blocks_bounds_what_a_windowed_sequence_ever_holds(size: int, window: int, chunk: int, n: int) -> None:
    group = one_group(size, window).groups[0]
    for start in range(n):
        end = min(n, start + chunk)
        assert group.entries_of(end) - int(group.first_needed(ints(start))[0]) <= group.peak_pages(n, chunk)


def test_extend_reports_each_changed_cell_once() -> None:
    kv = manager()
    kv.extend(ints(2, 0, 1), ints(5, 4, 9))
    tables, rows, columns, ids = kv.take_changes()
    assert not tables.any()
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [(2, 0), (2, 1), (0, 0), (1, 0), (1, 1), (1, 2)]
    assert kv.tables[0].pages[0, rows, columns].tolist() == ids.tolist()
    kv.extend(ints(2, 0, 1), ints(6, 5, 10))
    assert [a.tolist() for a in kv.take_changes()][:3] == [[0], [0], [1]]
    kv.check()


def test_missing_says_how_many_blocks_the_pool_lacks() -> None:
    kv = manager(num_blocks=4)
    assert kv.missing(ints(0, 1), ints(8, 4)) == 0
    assert kv.missing(ints(0, 1), ints(9, 8)) == 2


def test_a_freed_row_leaves_no_change_behind() -> None:
    kv = manager()
    kv.extend(ints(0, 1), ints(4, 4))
    kv.free(0)
    assert kv.take_changes()[1].tolist() == [1]
    kv.check()


def test_blocks_behind_the_window_are_released_and_their_entries_null() -> None:
    kv = manager(window=4)
    kv.extend(ints(0), ints(12))
    kv.take_changes()
    kv.trim(ints(0), ints(12))  # sees 9 .. 12
    assert kv.tables[0].pages[0, 0, :4].tolist()[:2] == [0, 0]
    assert kv.pool.num_used == 1
    assert [a.tolist() for a in kv.take_changes()] == [[0, 0], [0, 0], [0, 1], [0, 0]]
    kv.check()


def test_a_sequence_alone_may_fill_the_whole_pool() -> None:
    assert manager(num_blocks=6).max_tokens_alone(chunk=8) == 20
    assert manager(num_blocks=60).max_tokens_alone(chunk=8) == 40
    assert manager(num_blocks=6, window=8).max_tokens_alone(chunk=8) == 40
