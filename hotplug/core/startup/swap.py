"""An engine's swap space: its memory, and what moves blocks between it and the caches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hotplug.core.errors import OutOfMemoryError
from hotplug.core.layers.kv_cache import KVBlocks
from hotplug.core.platform.optional import HasKV, HasRuntime
from hotplug.core.runner import kv_memory
from hotplug.core.startup.bind import Bound
from hotplug.core.transfer.blocks import Copy
from hotplug.core.transfer.swap import BlockSwap, SwapSpace


def make_space(bound: Bound) -> SwapSpace | None:
    """The memory of the swap space; None without any. Taken before the KV cache is sized: a little of it
    is the device's. Raises OutOfMemoryError."""
    kv = bound.kv
    if not kv.swap_blocks:
        return None
    platform, device = bound.placement.platform, bound.placement.device
    shared = bound.placement.limits.shared_host_memory
    kv_memory.check_swap_space(
        kv.swap_blocks * kv.block_bytes,
        platform.memory(device).free if shared else kv_memory.host_free(),
    )
    try:
        return SwapSpace(
            kv.swap_blocks,
            kv.one_block,
            kv.dtype,
            host=platform.pinned if isinstance(platform, HasRuntime) else _pageable,
            device=lambda sizes, dtype: kv_memory.zeros(sizes, dtype, platform, device),
        )
    except RuntimeError as e:  # what torch raises where memory cannot be had, or not be pinned
        raise OutOfMemoryError("the swap space cannot be taken", why=str(e), hint="Lower --swap-space.") from e


def make_swap(bound: Bound, kv: list[KVBlocks], space: SwapSpace | None) -> BlockSwap | None:
    """What moves blocks between the caches and the swap space."""
    if space is None or bound.kv.block_copy is None:
        return None
    platform = bound.placement.platform
    if isinstance(platform, HasKV):
        copy: Copy = platform.copy
    else:
        copy = _queue if isinstance(platform, HasRuntime) else _copy
    return BlockSwap(kv, space, copy, bound.kv.block_copy, bound.rows.batch.index_dtype)


def warm_up_swap(bound: Bound, kv: list[KVBlocks]) -> None:
    """Swap a block out and in again on torch's meta device, if `bound` swaps: `kv` and the plan are on it."""
    if bound.kv.block_copy is None:
        return
    space = SwapSpace(1, bound.kv.one_block, bound.kv.dtype, host=_nowhere, device=_nowhere)
    swap = BlockSwap(kv, space, _copy, bound.kv.block_copy, bound.rows.batch.index_dtype)
    swap.swap_out([(0, 0)])
    swap.swap_in([(0, 0)])


def _pageable(sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(sizes), dtype=dtype)


def _nowhere(sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(sizes), dtype=dtype, device="meta")


def _copy(source: Tensor, target: Tensor) -> None:
    target.copy_(source)


def _queue(source: Tensor, target: Tensor) -> None:
    """Host memory is pinned here, so the host need not wait: the stream keeps the order."""
    target.copy_(source, non_blocking=True)
