"""The pool of host blocks, and swapping by the KV manager."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from kv_groups import one_group

from hotplug.core.kv.host import HostPool
from hotplug.core.kv.manager import KVManager
from hotplug.core.kv.prefix import BlockHashes


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def table(kv: KVManager) -> np.ndarray:
    """[rows, entries]: the only block table."""
    return kv.tables[0].pages[0]


def manager(num_host_blocks: int = 9, window: int | None = None) -> KVManager:
    group = one_group(4, window)
    return KVManager(group, num_pages=9, max_num_seqs=4, max_model_len=40, num_host_pages=num_host_blocks)


def digests(n: int) -> list[bytes]:
    return BlockHashes(4).extend(np.arange(n, dtype=np.int32), n // 4)


# --- the pool ---


def test_every_block_stored_is_copied_once_into_a_block_of_its_own() -> None:
    pool = HostPool(5)
    blocks = pool.store([7, 3, 9], [None] * 3)
    assert blocks is not None and len({*blocks}) == 3 and 0 not in blocks
    assert sorted(pool.take_copies()) == sorted(zip([7, 3, 9], blocks, strict=True))
    assert pool.take_copies() == []


def test_without_room_nothing_is_taken() -> None:
    pool = HostPool(3)
    assert pool.store([1, 2, 3], [None, b"a", None]) is None
    assert (pool.blocks.num_used, pool.take_copies()) == (0, [])


def test_what_the_host_has_is_shared_and_not_copied_again() -> None:
    pool = HostPool(4)
    first = pool.store([1, 2], [b"a", None])
    pool.take_copies()
    second = pool.store([5, 6], [b"a", b"b"])
    assert first is not None and second is not None and second[0] == first[0]
    assert pool.take_copies() == [(6, second[1])]
    pool.release(first)
    assert pool.blocks.num_used == 2


def test_a_released_block_with_a_hash_is_found_until_it_is_given_away() -> None:
    pool = HostPool(2)
    held = pool.store([1], [b"a"])
    assert held is not None
    pool.take_copies()
    pool.release(held)
    assert pool.store([4], [b"a"]) == held and pool.take_copies() == []
    pool.release(held)
    assert pool.store([4], [b"b"]) == held and pool.take_copies() == [(4, held[0])]


def test_room_is_not_counted_twice_where_a_free_block_is_shared() -> None:
    pool = HostPool(3)
    held = pool.store([1, 2], [b"a", None])
    assert held is not None
    pool.release(held)
    assert pool.store([1, 2, 3], [b"a", None, None]) is None
    assert pool.store([1, 2], [b"a", None]) is not None


def test_a_block_given_away_before_its_copy_was_planned_is_copied_to_once() -> None:
    pool = HostPool(2)
    held = pool.store([1], [b"a"])
    assert held is not None
    pool.release(held)
    assert pool.store([2], [b"b"]) == held
    assert pool.take_copies() == [(2, held[0])]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 99), st.integers(1, 6)), max_size=60))
def test_random_use_keeps_the_pool_consistent(script: list[tuple[int, int, int]]) -> None:
    """Contents are simulated: a host block must hold what was stored in it for as long as it is held."""
    pool, contents = HostPool(9), {}
    held: list[tuple[list[int], list[int]]] = []  # host blocks, and what they must hold
    for action, n, size in script:
        if action == 0:
            # A device block's number is its content here; multiples of three have no hash.
            device = [10 * size + i for i in range(1 + n % 6)]
            blocks = pool.store(device, [None if d % 3 == 0 else bytes([d]) for d in device])
            if blocks is not None:
                held.append((blocks, device))
        elif action == 1 and held:
            pool.release(held.pop(n % len(held))[0])
        elif action == 2:
            copies = pool.take_copies()
            assert len({host for _, host in copies}) == len(copies)
            contents |= {host: device for device, host in copies}
            for blocks, wanted in held:
                assert [contents[block] for block in blocks] == wanted
        pool.blocks.check()
    assert pool.blocks.num_used == len({b for blocks, _ in held for b in blocks})
    for blocks, _ in held:
        pool.release(blocks)
    assert pool.blocks.num_used == 0


# --- swapping ---


def test_swapping_out_keeps_the_computed_blocks_and_frees_the_rows_own() -> None:
    kv = manager()
    kv.extend(ints(0), ints(10))
    before = table(kv)[0, :3].tolist()
    swapped = kv.swap_out(0, 10, digests(8))
    kv.free(0)
    assert swapped is not None and (swapped.num_tokens, swapped.firsts) == (10, (0,))
    assert kv.pool.num_used == 0
    assert sorted(kv.take_swap_out()) == sorted(zip(before, swapped.pages, strict=True))
    kv.check()


def test_swapping_in_shares_what_is_cached_and_copies_the_rest() -> None:
    kv = manager()
    kv.extend(ints(0), ints(10))
    kv.register(0, digests(8), 2)
    swapped = kv.swap_out(0, 10, digests(8))
    assert swapped is not None
    kv.free(0)
    others = kv.pool.allocate(7)  # all but the first block of the sequence, which is the last to be evicted
    shared = kv.match(digests(8))
    assert shared.num_blocks == 1
    kv.pool.release(others)
    kv.take_changes()
    copies = kv.swap_in(1, swapped, shared)
    assert [host for _, host in copies] == swapped.pages[1:]
    assert table(kv)[1, :3].tolist() == [*shared.pages[0][0], *(block for block, _ in copies)]
    assert [a.tolist() for a in kv.take_changes()][1:3] == [[1, 1, 1], [0, 1, 2]]
    kv.drop(swapped)
    assert kv.host is not None and kv.host.blocks.num_used == 0
    kv.check()


def test_blocks_behind_a_window_are_not_kept() -> None:
    kv = manager(window=6)
    kv.extend(ints(0), ints(18))
    kv.trim(ints(0), ints(18))  # sees 13 .. 18
    swapped = kv.swap_out(0, 18, digests(16))
    kv.free(0)
    assert swapped is not None and (swapped.firsts, len(swapped.pages)) == ((3,), 2)
    copies = kv.swap_in(0, swapped, kv.match([]))
    assert table(kv)[0, :6].tolist() == [0, 0, 0, copies[0][0], copies[1][0], 0]
    kv.check()


def test_without_a_host_pool_nothing_is_swapped() -> None:
    kv = manager(num_host_blocks=0)
    kv.extend(ints(0), ints(10))
    assert kv.swap_out(0, 10, []) is None and kv.take_swap_out() == []
