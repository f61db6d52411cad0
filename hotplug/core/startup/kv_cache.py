"""A stage of a start: how many KV blocks there is memory for, once the weights are in place, and the cache itself."""

from __future__ import annotations

from dataclasses import dataclass

from hotplug.core.layers.kv_cache import KVBlocks
from hotplug.core.platform.base import ExecMode
from hotplug.core.runner import kv_memory, memory_guard
from hotplug.core.runner.executable import EagerStep
from hotplug.core.runner.memory_guard import MemoryGuard
from hotplug.core.runner.profile import run_largest_steps
from hotplug.core.runner.runner import Runner
from hotplug.core.scheduler.config import MOST_SCORED
from hotplug.core.startup.bind import Bound
from hotplug.core.startup.executables import graph_memory


@dataclass(frozen=True, slots=True)
class KVMemory:
    """How a device's memory is divided once the weights are in place."""

    num_blocks: int
    """KV blocks that fit, the null block among them."""
    reserved: int
    """Bytes that are left for recorded steps beside them."""


def check_asked(bound: Bound) -> None:
    """Raise OutOfMemoryError where a cache of the size that the user set does not fit before weights are read: it would
    not afterwards, and reading them takes minutes."""
    if bound.config.kv_cache_memory is not None:
        placement = bound.placement
        kv_memory.budget(bound.config, placement.limits, placement.platform.memory(placement.device))


def measure(bound: Bound) -> KVMemory:
    """The memory for KV blocks. Weights are in place, and where the size follows from them, workspaces too.

    Raises OutOfMemoryError if it is too little.
    """
    config, placement = bound.config, bound.placement
    limits, platform, device = placement.limits, placement.platform, placement.device
    capped = config.kv_cache_memory is not None
    reserved = 0
    if not capped and not limits.shared_host_memory and ExecMode.EAGER in limits.exec_modes:
        scratch = bound.kv.allocate(1, placement)
        with MemoryGuard("running the largest step", placement.selection, memory_guard.PROFILE):
            _run_largest(bound, scratch)
            memory = platform.memory(device)
            reserved = graph_memory(bound, scratch)  # what it has taken need not be free at once
    else:
        memory = platform.memory(device)
    size = kv_memory.budget(config, limits, memory, placement.sharing) - reserved
    chunk = bound.options.resolved.max_num_batched_tokens
    found = bound.kv.num_blocks(size, bound.options.max_model_len, chunk, capped=capped)
    compiles = bound.options.resolved.exec_mode is ExecMode.COMPILE
    # The number is a shape of compiled programs: a rounded one finds its artifacts again at the next start.
    return KVMemory(kv_memory.rounded(found) if compiles and not capped else found, reserved)


def _run_largest(bound: Bound, scratch: list[KVBlocks]) -> None:
    """Run the largest steps op by op over a scratch cache, so that their workspaces exist."""
    model, batch, resolved = bound.model.decoder, bound.rows.batch, bound.options.resolved
    run_largest_steps(
        Runner(model, batch, bound.rows.sampler, EagerStep(model, scratch, batch)),
        max_num_seqs=resolved.max_num_seqs,
        max_num_batched_tokens=resolved.max_num_batched_tokens,
        max_model_len=bound.options.max_model_len,
        max_verified=MOST_SCORED if resolved.speculates else 0,
    )


def allocate(bound: Bound, num_blocks: int) -> list[KVBlocks]:
    """The KV cache. Raises OutOfMemoryError."""
    capped = bound.config.kv_cache_memory is not None
    hint = memory_guard.KV_CACHE_CAPPED if capped else memory_guard.KV_CACHE
    asked = num_blocks * bound.kv.block_bytes
    with MemoryGuard("allocating the KV cache", bound.placement.selection, hint, asked=asked):
        return bound.kv.allocate(num_blocks, bound.placement)
