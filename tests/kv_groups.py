"""KV groups for tests of the scheduler and its pool, where shapes do not matter."""

from __future__ import annotations

from hotplug.core.kv.groups import KVGroups, make_groups
from hotplug.core.kv.spec import BlockFormat, FullAttention, KVSpec, SlidingWindow


def one_group(block_size: int, window: int | None = None) -> KVGroups:
    """Two layers with equal specs, whose blocks take a page."""
    return groups_of([spec_of(window)] * 2, block_size)


def groups_of(specs: list[KVSpec], block_size: int) -> KVGroups:
    return make_groups(specs, BlockFormat(block_size, "NHD", "float32"))


def spec_of(window: int | None = None) -> FullAttention:
    """One head of one element."""
    if window is None:
        return FullAttention(num_kv_heads=1, head_dim=1)
    return SlidingWindow(num_kv_heads=1, head_dim=1, window=window)
