"""KV cache memory: how large it may be, and its tensors; how large the swap space on the host is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from hotplug.core.config import EngineConfig, parse_bytes
from hotplug.core.errors import OutOfMemoryError
from hotplug.core.kv.groups import KVGroups
from hotplug.core.layers.kv_cache import KVBlocks
from hotplug.core.ops.dtypes import TORCH_DTYPES
from hotplug.core.platform.base import DeviceInfo, Limits, MemoryInfo, Platform
from hotplug.core.platform.optional import HasKV

SHARED_DEFAULT = 4 << 30
SHARED_FRACTION = 0.4
"""Where KV shares the host's memory and nobody set a size: at most this many bytes, and this share of what
is free, since a server must not starve its own machine."""


def budget(config: EngineConfig, limits: Limits, memory: MemoryInfo, sharing: int = 1) -> int:
    """Bytes for the KV cache of one of `sharing` ranks on a device.

    `memory` is taken once weights and workspaces are in place.

    Raises OutOfMemoryError when what was asked for is not there.
    """
    if config.kv_cache_memory is not None:
        asked = parse_bytes(config.kv_cache_memory)
        if asked > memory.free:
            raise OutOfMemoryError(
                f"the KV cache was to take {_gib(asked)}, {_gib(memory.free)} of {_gib(memory.total)} are free",
                hint="Lower --kv-cache-memory.",
            )
        return asked // sharing
    if limits.shared_host_memory:
        return min(SHARED_DEFAULT, int(memory.free * SHARED_FRACTION)) // sharing
    return (int(memory.total * config.memory_utilization) - (memory.total - memory.free)) // sharing


def num_pages(groups: KVGroups, size: int, max_model_len: int, chunk: int, *, capped: bool) -> int:
    """Pages that fit `size` bytes, the null page among them. Raises OutOfMemoryError if too few.

    `capped` says that the user set the size, so a pool smaller than one full sequence, which grows by `chunk` tokens a
    step at most, is his choice.
    """
    pages = size // groups.page_bytes
    least = 1 + (groups.num_tables if capped else groups.peak_pages(max_model_len, chunk))
    if pages < least:
        raise OutOfMemoryError(
            f"{_gib(max(size, 0))} hold {max(pages, 0)} KV blocks, {least} are needed",
            why=f"{_block(groups)} {groups.page_bytes / 2**20:.2f} MiB over all layers",
            hint="Raise --kv-cache-memory or --memory-utilization, or lower --max-model-len.",
        )
    return pages


def check_context(
    config: EngineConfig, limits: Limits, memory: MemoryInfo, groups: KVGroups, positions: int, sharing: int, *,
    chunk: int, rotary_dim: int,
) -> None:  # fmt: skip
    """Refuse a context too long for the device before weights are read. `memory` is what is free without them.

    Raises OutOfMemoryError.
    """
    table = positions * rotary_dim * torch.float32.itemsize
    if table > memory.free:
        raise OutOfMemoryError(
            f"the rotary table of {positions:,} positions takes {_gib(table)}, {_gib(memory.free)} of "
            f"{_gib(memory.total)} are free",
            hint="Lower --max-model-len.",
        )
    if config.kv_cache_memory is None:
        num_pages(groups, budget(config, limits, memory, sharing), positions, chunk, capped=False)


def rounded(pages: int) -> int:
    """`pages` without all but its four leading binary digits: at most an eighth less."""
    spare = max(pages.bit_length() - 4, 0)
    return pages >> spare << spare


def lane_shape(groups: KVGroups, pages: int) -> list[int]:
    """[lanes, tensors of a lane, pages, ...]: the shape of the whole cache."""
    count, page = groups.page
    return [groups.lanes, count, pages, *page.shape]


def page_dtype(groups: KVGroups) -> torch.dtype:
    """The dtype of the cache's memory."""
    return TORCH_DTYPES[groups.page[1].dtype]


def allocate(groups: KVGroups, pages: int, platform: Platform, device: DeviceInfo) -> list[KVBlocks]:
    """The tensors of each lane, zeroed."""
    cache = zeros(lane_shape(groups, pages), page_dtype(groups), platform, device)
    return [lane.unbind() for lane in cache]


def zeros(sizes: Sequence[int], dtype: torch.dtype, platform: Platform, device: DeviceInfo) -> torch.Tensor:
    """Zeroed memory for KV blocks, the platform's own kind where it has one."""
    if isinstance(platform, HasKV):
        return platform.allocate(sizes, dtype, device)
    return torch.zeros(sizes, dtype=dtype, device=torch_device(platform, device))


def swap_pages(groups: KVGroups, config: EngineConfig) -> int:
    """Host pages that fit the configured swap space, the null page among them; 0 without one.

    Raises OutOfMemoryError if it is too small for any.
    """
    if config.swap_space is None:
        return 0
    size = parse_bytes(config.swap_space) // config.tensor_parallel_size  # host memory is that of all ranks
    pages = size // groups.page_bytes
    if pages < 2:
        raise OutOfMemoryError(
            f"a swap space of {size:,} bytes holds {max(pages, 0)} KV blocks, 2 are the least (block 0 is never used)",
            why=f"{_block(groups)} {groups.page_bytes:,} bytes over all layers",
            hint="Raise --swap-space, or leave it out to recompute what is preempted.",
        )
    return pages


def check_swap_space(size: int, free: int) -> None:
    """Raises OutOfMemoryError when `size` bytes of swap space are not among the `free` bytes of the host."""
    if size > free:
        raise OutOfMemoryError(
            f"the swap space was to take {_gib(size)}, {_gib(free)} of host memory are free",
            hint="Lower --swap-space.",
        )


def host_free(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of host memory that this process may still take: of the machine, and of its control group's limit."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        usage = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:  # no control group of version 2, or its root, which has no limit
        return free
    if not limit.isdigit():
        return free
    reclaimable = int(usage.get("active_file", 0)) + int(usage.get("inactive_file", 0))
    return max(0, min(free, int(limit) - int(used) + reclaimable))


def torch_device(platform: Platform, device: DeviceInfo) -> torch.device:
    """The torch device of a probed device; types that have but one take no index."""
    if platform.torch_device in ("cpu", "meta"):
        return torch.device(platform.torch_device)
    return torch.device(platform.torch_device, device.index)


def _block(groups: KVGroups) -> str:
    """The beginning of a sentence that ends with a page's size."""
    tables = groups.num_tables
    what = "a block" if tables == 1 else f"each of the {tables} pages of a block"
    return f"{what} of {groups.block_size} tokens takes"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
