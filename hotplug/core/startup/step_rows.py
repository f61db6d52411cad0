"""A stage of a start: the rows of a step. The batch of the running requests, and the sampler's state of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hotplug.core.ops.dtypes import TORCH_DTYPES
from hotplug.core.ops.plan import Plan
from hotplug.core.platform.features import Resolved
from hotplug.core.platform.optional import HasRuntime
from hotplug.core.runner import memory_guard
from hotplug.core.runner.device_batch import DeviceBatch
from hotplug.core.runner.memory_guard import MemoryGuard
from hotplug.core.sample.processors import Factory
from hotplug.core.sample.sampler import Sampler
from hotplug.core.startup.placement import Placement


@dataclass(frozen=True, slots=True)
class Rows:
    """What is kept on the device by row."""

    batch: DeviceBatch
    sampler: Sampler


def make_rows(
    placement: Placement,
    resolved: Resolved,
    plan: Plan,
    processors: Mapping[str, Factory],
    *,
    reach: int,
    num_tables: int,
    vocab: int,
) -> Rows:
    """A row for each request that may run, of up to `reach` tokens of a vocabulary, in each of `num_tables` tables.

    `processors` are the logits processors that requests may name. Raises OutOfMemoryError.
    """
    platform, device = placement.platform, placement.torch_device
    with MemoryGuard("making room for the rows of a step", placement.selection, memory_guard.ROWS):
        batch = DeviceBatch(
            plan,
            max_rows=resolved.max_num_seqs,
            max_len=reach,
            block_size=resolved.block_size,
            num_tables=num_tables,
            index_dtype=TORCH_DTYPES[placement.limits.index_dtype],
            device=device,
            pin=platform.pinned if isinstance(platform, HasRuntime) and device.type != "meta" else None,
        )
    with MemoryGuard("making room for the sampler", placement.selection, memory_guard.SAMPLER):
        sampler = Sampler(plan, resolved.max_num_seqs, vocab, device, processors, speculates=resolved.speculates)
    return Rows(batch, sampler)
