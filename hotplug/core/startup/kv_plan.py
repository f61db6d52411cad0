"""A stage of a start: the KV cache before it has memory. What a block is, how far a sequence can reach, what the host
holds of it. Its memory, and who gives its blocks to requests, follow from that."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hotplug.core.config import EngineConfig, parse_bytes
from hotplug.core.kv.groups import KVGroups, make_groups
from hotplug.core.kv.manager import KVManager
from hotplug.core.kv.spec import BlockFormat
from hotplug.core.layers.kv_cache import KVBlocks
from hotplug.core.models.decoder import Decoder
from hotplug.core.models.loader import find_model
from hotplug.core.ops.plan import Plan
from hotplug.core.platform.base import MemoryInfo
from hotplug.core.platform.features import Resolved
from hotplug.core.runner import kv_memory
from hotplug.core.startup.placement import Placement
from hotplug.core.startup.settle import Options
from hotplug.core.transfer.swap import BlockCopy
from hotplug.core.weights.config import ModelConfig


@dataclass(frozen=True, slots=True)
class KVPlan:
    """One rank's KV cache, but for the number of its blocks."""

    groups: KVGroups
    """What the layers keep of a sequence, and where."""
    reach: int
    """Positions that a sequence can reach: what block tables and the rotary table cover."""
    swap_blocks: int
    """Blocks of the swap space on the host, the null block among them; 0 without one."""
    block_copy: BlockCopy | None = None
    """The op that gathers and scatters them; None without a swap space."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one page in all lanes."""
        return self.groups.page_bytes

    @property
    def one_block(self) -> tuple[int, ...]:
        """The sizes of one page: [lanes, tensors of a lane, ...]."""
        lanes, sides, _, *inner = kv_memory.lane_shape(self.groups, 1)
        return lanes, sides, *inner

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the cache's memory."""
        return kv_memory.page_dtype(self.groups)

    def report(self) -> list[dict[str, Any]]:
        """The groups as plain data: kind, number of layers, pages that a block takes, and the spec in words."""
        return [
            {
                "kind": group.spec.kind,
                "layers": len(group.layers),
                "pages": len(group.tables),
                "spec": str(group.spec),
            }
            for group in self.groups.groups
        ]

    def num_blocks(self, size: int, max_model_len: int, chunk: int, *, capped: bool) -> int:
        """Pages that fit `size` bytes, for sequences that grow by `chunk` tokens at most; `capped`: the user set the
        size. Raises OutOfMemoryError if too few."""
        return kv_memory.num_pages(self.groups, size, max_model_len, chunk, capped=capped)

    def allocate(self, num_blocks: int, placement: Placement) -> list[KVBlocks]:
        """The memory of the cache, the tensors of each lane, zeroed."""
        return kv_memory.allocate(self.groups, num_blocks, placement.platform, placement.device)

    def on_meta(self) -> list[KVBlocks]:
        """A cache of one block without memory, on torch's meta device."""
        cache = torch.empty(kv_memory.lane_shape(self.groups, 1), dtype=self.dtype, device="meta")
        return [lane.unbind() for lane in cache]

    def manager(self, num_blocks: int, resolved: Resolved, *, prefix_cache: bool) -> KVManager:
        """Who gives the blocks of a cache to requests."""
        return KVManager(
            self.groups,
            num_pages=num_blocks,
            max_num_seqs=resolved.max_num_seqs,
            max_model_len=self.reach,
            enable_prefix_cache=prefix_cache,
            num_host_pages=self.swap_blocks,
        )


def plan_kv(
    config: EngineConfig,
    placement: Placement,
    options: Options,
    model: ModelConfig,
    models: Mapping[str, type[Decoder]],
) -> KVPlan:
    """The KV cache of `model`, which is a rank's part; `models` are the classes by architecture.

    Raises OutOfMemoryError for a swap space that holds no block.
    """
    resolved = options.resolved
    form = BlockFormat(resolved.block_size, str(resolved.kv_layout), resolved.kv_dtype)
    groups = make_groups(find_model(model, models).kv_specs(model), form)
    reach = min(options.max_model_len, _reachable(config, options, groups, placement.sharing))
    return KVPlan(groups, reach, kv_memory.swap_pages(groups, config))


def check_kv(config: EngineConfig, placement: Placement, options: Options, kv: KVPlan, rotary_dim: int) -> None:
    """Refuse a context that does not fit the device, before weights are read. Raises OutOfMemoryError."""
    memory: MemoryInfo = placement.platform.memory(placement.device)
    kv_memory.check_context(
        config,
        placement.limits,
        memory,
        kv.groups,
        kv.reach,
        placement.sharing,
        chunk=options.resolved.max_num_batched_tokens,
        rotary_dim=rotary_dim,
    )


def bind_block_copy(kv: KVPlan, plan: Plan, resolved: Resolved) -> KVPlan:
    """`kv` with the op that swaps its blocks, where there is a swap space."""
    if not kv.swap_blocks:
        return kv
    copy = plan.bind("block_copy", "swap", resolved.dtype, page_bytes=kv.groups.page[1].bytes)
    return dataclasses.replace(kv, block_copy=copy)


def _reachable(config: EngineConfig, options: Options, groups: KVGroups, sharing: int) -> int:
    """Positions that a sequence can reach in the KV cache that the user allows; `max_model_len` where he sets none."""
    most = options.max_model_len
    if config.kv_cache_memory is None:
        return most
    usable = parse_bytes(config.kv_cache_memory) // sharing // groups.page_bytes - 1  # without the null page
    longest = groups.longest(usable, most, options.resolved.max_num_batched_tokens)
    # One block more than fits, so that it is the cache that a longer prompt is refused for, and not the context.
    return most if longest == most else longest + groups.block_size + 1
