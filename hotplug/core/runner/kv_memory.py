"""KV cache memory: how large it may be, and its tensors; how large the swap space on the host is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hotplug.core.config import EngineConfig, parse_bytes
from hotplug.core.errors import OutOfMemoryError
from hotplug.core.kv.groups import KVGroup
from hotplug.core.layers.attention import KVBlocks
from hotplug.core.platform.base import DeviceInfo, KVLayout, Limits, MemoryInfo, Platform
from hotplug.core.platform.optional import HasKV
from hotplug.core.weights.config import ModelConfig

SHARED_DEFAULT = 4 << 30
SHARED_FRACTION = 0.4
"""Where KV shares the host's memory and nobody set a size: at most this many bytes, and this share of what
is free, since a server must not starve its own machine."""


@dataclass(frozen=True, slots=True)
class KVShape:
    """The shape of the cache, but for the number of blocks."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    layout: KVLayout
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, keys and values."""
        elements = self.num_layers * 2 * self.block_size * self.num_kv_heads * self.head_dim
        return elements * self.dtype.itemsize

    def tensor_shape(self, num_blocks: int) -> list[int]:
        """[layers, 2, blocks, ...] in the layout's order."""
        inner = [self.block_size, self.num_kv_heads, self.head_dim]
        if self.layout is KVLayout.HND:
            inner = [self.num_kv_heads, self.block_size, self.head_dim]
        return [self.num_layers, 2, num_blocks, *inner]


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


def num_blocks(shape: KVShape, size: int, max_model_len: int, *, capped: bool) -> int:
    """Blocks that fit `size` bytes, the null block among them. Raises OutOfMemoryError if too few.

    `capped` says that the user set the size, so a pool smaller than one full sequence is his choice.
    """
    blocks = size // shape.block_bytes
    least = 2 if capped else 1 + -(-max_model_len // shape.block_size)
    if blocks < least:
        raise OutOfMemoryError(
            f"{_gib(max(size, 0))} hold {max(blocks, 0)} KV blocks, {least} are needed",
            why=f"a block of {shape.block_size} tokens takes {shape.block_bytes / 2**20:.2f} MiB over all layers",
            hint="Raise --kv-cache-memory or --memory-utilization, or lower --max-model-len.",
        )
    return blocks


def check_context(
    config: EngineConfig, limits: Limits, memory: MemoryInfo, shape: KVShape, positions: int, sharing: int
) -> None:
    """Refuse a context too long for the device before weights are read. `memory` is what is free without them.

    Raises OutOfMemoryError.
    """
    table = positions * shape.head_dim * torch.float32.itemsize
    if table > memory.free:
        raise OutOfMemoryError(
            f"the rotary table of {positions:,} positions takes {_gib(table)}, {_gib(memory.free)} of "
            f"{_gib(memory.total)} are free",
            hint="Lower --max-model-len.",
        )
    if config.kv_cache_memory is None:
        num_blocks(shape, budget(config, limits, memory, sharing), positions, capped=False)


def group(model: ModelConfig, block_size: int) -> KVGroup:
    """Full attention unless every layer slides; then blocks behind the window are freed."""
    sliding = len(model.sliding_layers) == model.num_layers
    return KVGroup(block_size=block_size, window=model.sliding_window if sliding else None)


def rounded(blocks: int) -> int:
    """`blocks` without all but its four leading binary digits: at most an eighth less."""
    spare = max(blocks.bit_length() - 4, 0)
    return blocks >> spare << spare


def allocate(shape: KVShape, blocks: int, platform: Platform, device: DeviceInfo) -> list[KVBlocks]:
    """One (keys, values) pair a layer, zeroed."""
    cache = zeros(shape.tensor_shape(blocks), shape.dtype, platform, device)
    return [(layer[0], layer[1]) for layer in cache]


def zeros(sizes: Sequence[int], dtype: torch.dtype, platform: Platform, device: DeviceInfo) -> torch.Tensor:
    """Zeroed memory for KV blocks, the platform's own kind where it has one."""
    if isinstance(platform, HasKV):
        return platform.allocate(sizes, dtype, device)
    return torch.zeros(sizes, dtype=dtype, device=torch_device(platform, device))


def swap_blocks(shape: KVShape, config: EngineConfig) -> int:
    """Host blocks that fit the configured swap space, the null block among them; 0 without one.

    Raises OutOfMemoryError if it is too small for any.
    """
    if config.swap_space is None:
        return 0
    size = parse_bytes(config.swap_space) // config.tensor_parallel_size  # host memory is that of all ranks
    blocks = size // shape.block_bytes
    if blocks < 2:
        raise OutOfMemoryError(
            f"a swap space of {size:,} bytes holds {max(blocks, 0)} KV blocks, 2 are the least (block 0 is never used)",
            why=f"a block of {shape.block_size} tokens takes {shape.block_bytes:,} bytes over all layers",
            hint="Raise --swap-space, or leave it out to recompute what is preempted.",
        )
    return blocks


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


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
