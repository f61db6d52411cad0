"""A stage of a start: the KV cache before it has memory. What a block is, how far a sequence can reach, what the host
holds of it. Its memory, and who gives its blocks to requests, follow from that."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from hotplug.core.config import EngineConfig, parse_bytes
from hotplug.core.kv.groups import KVGroup
from hotplug.core.kv.manager import KVManager
from hotplug.core.layers.attention import KVBlocks
from hotplug.core.ops.plan import Plan
from hotplug.core.platform.base import MemoryInfo
from hotplug.core.platform.features import Resolved
from hotplug.core.runner import kv_memory
from hotplug.core.runner.kv_memory import KVShape
from hotplug.core.startup.placement import Placement
from hotplug.core.startup.settle import TORCH_DTYPES, Options
from hotplug.core.transfer.swap import BlockCopy
from hotplug.core.weights.config import ModelConfig


@dataclass(frozen=True, slots=True)
class KVPlan:
    """One rank's KV cache, but for the number of its blocks."""

    shape: KVShape
    group: KVGroup
    """Which blocks of a sequence are kept."""
    reach: int
    """Positions that a sequence can reach: what block tables and the rotary table cover."""
    swap_blocks: int
    """Blocks of the swap space on the host, the null block among them; 0 without one."""
    block_copy: BlockCopy | None = None
    """The op that gathers and scatters them; None without a swap space."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, keys and values."""
        return self.shape.block_bytes

    @property
    def one_block(self) -> tuple[int, ...]:
        """The sizes of one block over all layers: [layers, 2, ...] in the layout's order."""
        layers, sides, _, *inner = self.shape.tensor_shape(1)
        return layers, sides, *inner

    @property
    def dtype(self) -> torch.dtype:
        """What keys and values are stored in."""
        return self.shape.dtype

    def num_blocks(self, size: int, max_model_len: int, *, capped: bool) -> int:
        """Blocks that fit `size` bytes; `capped`: the user set the size. Raises OutOfMemoryError if too few."""
        return kv_memory.num_blocks(self.shape, size, max_model_len, capped=capped)

    def allocate(self, num_blocks: int, placement: Placement) -> list[KVBlocks]:
        """The memory of the cache, a pair of keys and values a layer, zeroed."""
        return kv_memory.allocate(self.shape, num_blocks, placement.platform, placement.device)

    def on_meta(self) -> list[KVBlocks]:
        """A cache of one block without memory, on torch's meta device."""
        cache = torch.empty(self.shape.tensor_shape(1), dtype=self.dtype, device="meta")
        return [(layer[0], layer[1]) for layer in cache]

    def manager(self, num_blocks: int, resolved: Resolved, *, prefix_cache: bool) -> KVManager:
        """Who gives the blocks of a cache to requests."""
        return KVManager(
            self.group,
            num_blocks=num_blocks,
            max_num_seqs=resolved.max_num_seqs,
            max_model_len=self.reach,
            enable_prefix_cache=prefix_cache,
            num_host_blocks=self.swap_blocks,
        )


def plan_kv(config: EngineConfig, placement: Placement, options: Options, model: ModelConfig) -> KVPlan:
    """The KV cache of `model`, which is a rank's part. Raises OutOfMemoryError for a swap space without room."""
    resolved = options.resolved
    shape = KVShape(
        model.num_layers,
        model.num_kv_heads,
        model.head_dim,
        resolved.block_size,
        resolved.kv_layout,
        TORCH_DTYPES[resolved.kv_dtype],
    )
    group = kv_memory.group(model, resolved.block_size)
    reach = min(options.max_model_len, _reachable(config, options, shape, group, placement.sharing))
    return KVPlan(shape, group, reach, kv_memory.swap_blocks(shape, config))


def check_kv(config: EngineConfig, placement: Placement, kv: KVPlan) -> None:
    """Refuse a context that does not fit the device, before weights are read. Raises OutOfMemoryError."""
    memory: MemoryInfo = placement.platform.memory(placement.device)
    kv_memory.check_context(config, placement.limits, memory, kv.shape, kv.reach, placement.sharing)


def bind_block_copy(kv: KVPlan, plan: Plan, resolved: Resolved) -> KVPlan:
    """`kv` with the op that swaps its blocks, where there is a swap space."""
    if not kv.swap_blocks:
        return kv
    shape = kv.shape
    copy = plan.bind("block_copy", "swap", resolved.dtype, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim,
                     block_size=shape.block_size, layout=str(shape.layout), kv_dtype=resolved.kv_dtype)  # fmt: skip
    return dataclasses.replace(kv, block_copy=copy)


def _reachable(config: EngineConfig, options: Options, shape: KVShape, group: KVGroup, sharing: int) -> int:
    """Positions that a sequence can reach in the KV cache that the user allows; `max_model_len` where he sets none."""
    if config.kv_cache_memory is None:
        return options.max_model_len
    blocks = parse_bytes(config.kv_cache_memory) // sharing // shape.block_bytes
    peak = group.peak_blocks(options.max_model_len, options.resolved.max_num_batched_tokens)
    # One more than fits, so that it is the cache that a longer prompt is refused for, and not the context.
    return options.max_model_len if peak < blocks else blocks * shape.block_size + 1
