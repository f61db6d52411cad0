"""Where a layer's part of the KV cache is, and its tensors there."""

from __future__ import annotations

from torch import Tensor

from hotplug.core.kv.groups import KVGroups
from hotplug.core.ops.dtypes import TORCH_DTYPES

KVBlocks = tuple[Tensor, ...]
"""What one layer keeps, all blocks of it: one tensor [num_blocks, ...] for each of `KVSpec.tensors`."""


class KVSlot:
    """Where one layer's blocks are: its lane, its block table, and its tensors in a lane (`hotplug.core.kv.groups`)."""

    def __init__(self, groups: KVGroups, layer: int) -> None:
        self.lane, self.table = groups.lane_of[layer], groups.table_of[layer]
        self.spec, self.form = groups.spec_of[layer], groups.form
        self._tensors = self.spec.tensors(groups.form) if groups.views else ()
        self._offsets = groups.offsets(layer)

    def caches(self, lane: KVBlocks) -> KVBlocks:
        """The layer's tensors in its lane: those of the lane, or views of its bytes."""
        if not self._tensors:
            return lane
        (pages,) = lane
        found = []
        for tensor, begin in zip(self._tensors, self._offsets, strict=False):
            own = pages[:, begin : begin + tensor.bytes].view(TORCH_DTYPES[tensor.dtype])
            found.append(own.view(len(pages), *tensor.shape))
        return tuple(found)

    def store(self, lanes: list[KVBlocks], written: KVBlocks) -> None:
        """Keep what a write gave for the layers that follow: in whole-step programs it is another tensor."""
        if not self._tensors:
            lanes[self.lane] = written
