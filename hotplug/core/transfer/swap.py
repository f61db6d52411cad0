"""Swap space: KV blocks of preempted requests in host memory, and the copies there and back.

Which block goes where is the scheduler's business (`StepPlan.swap_out`, `StepPlan.swap_in`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hotplug.core.layers.attention import KVBlocks
from hotplug.core.transfer.blocks import Copy

PIECE_BYTES = 256 << 20
"""Host memory is taken in pieces of at most this: allocators of pinned memory round up to a power of two."""
STAGE_BYTES = 64 << 20
"""Device memory through which blocks pass, at most (one block at least)."""

Pairs = Sequence[tuple[int, int]]
"""(device block, host block)"""
Allocate = Callable[[Sequence[int], torch.dtype], Tensor]
"""Memory of a shape and dtype."""


class SwapSpace:
    """Memory for `num_blocks` blocks on the host, and for a few of them on the device, the stage.

    A block's keys and values are scattered over the caches of all layers. On the stage they lie together, so that
    a block crosses the bus in one copy.
    """

    def __init__(
        self, num_blocks: int, block_shape: Sequence[int], dtype: torch.dtype, *, host: Allocate, device: Allocate
    ) -> None:
        """`block_shape` is [layers, 2, ...]: keys and values of every layer, in the cache's layout."""
        size = math.prod(block_shape) * dtype.itemsize
        self._per_piece = max(1, PIECE_BYTES // size)
        starts = range(0, num_blocks, self._per_piece)
        self._pieces = [host((min(self._per_piece, num_blocks - at), *block_shape), dtype) for at in starts]
        self.stage = device((min(num_blocks, max(1, STAGE_BYTES // size)), *block_shape), dtype)
        """[blocks, layers, 2, ...]"""

    def block(self, index: int) -> Tensor:
        """[layers, 2, ...]: a block on the host."""
        piece, at = divmod(index, self._per_piece)
        return self._pieces[piece][at]


class BlockSwap:
    """Copies blocks between `kv`, one (keys, values) pair a layer, and a swap space.

    `kv` is looked at anew in each call: a compiled step replaces its entries.
    Everything is queued on the current stream, in the order of the calls: a copy may outlast its call where `copy`
    does not wait, but not the start of what is launched after it.
    """

    def __init__(self, kv: list[KVBlocks], space: SwapSpace, copy: Copy) -> None:
        self._kv = kv
        self._space = space
        self._copy = copy

    def swap_out(self, pairs: Pairs) -> None:
        """Copy blocks to the host."""
        stage = self._space.stage
        for part in self._parts(pairs):
            ids = self._index(part)
            for layer, caches in enumerate(self._kv):
                for side, cache in enumerate(caches):
                    stage[: len(part), layer, side] = cache[ids]
            for staged, (_, host) in zip(stage, part, strict=False):
                self._copy(staged, self._space.block(host))

    def swap_in(self, pairs: Pairs) -> None:
        """Copy blocks back to the device."""
        stage = self._space.stage
        for part in self._parts(pairs):
            for staged, (_, host) in zip(stage, part, strict=False):
                self._copy(self._space.block(host), staged)
            ids = self._index(part)
            for layer, caches in enumerate(self._kv):
                for side, cache in enumerate(caches):
                    cache[ids] = stage[: len(part), layer, side]

    def _parts(self, pairs: Pairs) -> list[Pairs]:
        """What fits the stage at once."""
        size = len(self._space.stage)
        return [pairs[at : at + size] for at in range(0, len(pairs), size)]

    def _index(self, pairs: Pairs) -> Tensor:
        """int64 [n] device blocks, on the device."""
        return torch.tensor([block for block, _ in pairs]).to(self._space.stage.device, non_blocking=True)
