"""Swap space: KV blocks of preempted requests in host memory, and the copies there and back.

Which block goes where is the scheduler's business (`StepPlan.swap_out`, `StepPlan.swap_in`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hotplug.core.layers.kv_cache import KVBlocks
from hotplug.core.transfer.blocks import Copy

PIECE_BYTES = 256 << 20
"""Host memory is taken in pieces of at most this: allocators of pinned memory round up to a power of two."""
STAGE_BYTES = 64 << 20
"""Device memory through which blocks pass, at most (one block at least)."""

Pairs = Sequence[tuple[int, int]]
"""(device block, host block)"""
Allocate = Callable[[Sequence[int], torch.dtype], Tensor]
"""Memory of a shape and dtype."""
BlockCopy = Callable[[list[Tensor], list[Tensor], Tensor], object]
"""The op `block_copy`, as it was bound."""


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
    """Copies blocks between `kv`, one (keys, values) pair a layer, and a swap space, whose stage they pass.

    `block_copy` gathers them on the stage and scatters them from it, by ids of `index_dtype`; `copy` crosses the bus.
    `kv` is looked at anew in each call: a compiled step replaces its entries.
    Everything is queued on the current stream, in the order of the calls: a copy may outlast its call where `copy`
    does not wait, but not the start of what is launched after it.
    """

    def __init__(
        self, kv: list[KVBlocks], space: SwapSpace, copy: Copy, block_copy: BlockCopy, index_dtype: torch.dtype
    ) -> None:
        self._kv = kv
        self._space = space
        self._copy = copy
        self._block_copy = block_copy
        self._index_dtype = index_dtype
        self._staged = [side for layer in space.stage.unbind(1) for side in layer.unbind(1)]
        """The stage as one [blocks, ...] a cache, in the order of `_caches`."""

    def swap_out(self, pairs: Pairs) -> None:
        """Copy blocks to the host."""
        for part in self._parts(pairs):
            moves = self._index([(block, at) for at, (block, _) in enumerate(part)])
            self._block_copy(self._caches(), self._staged, moves)
            for staged, (_, host) in zip(self._space.stage, part, strict=False):
                self._copy(staged, self._space.block(host))

    def swap_in(self, pairs: Pairs) -> None:
        """Copy blocks back to the device."""
        for part in self._parts(pairs):
            for staged, (_, host) in zip(self._space.stage, part, strict=False):
                self._copy(self._space.block(host), staged)
            moves = self._index([(at, block) for at, (block, _) in enumerate(part)])
            self._block_copy(self._staged, self._caches(), moves)

    def _caches(self) -> list[Tensor]:
        """Keys and values of every layer."""
        return [cache for caches in self._kv for cache in caches]

    def _parts(self, pairs: Pairs) -> list[Pairs]:
        """What fits the stage at once."""
        size = len(self._space.stage)
        return [pairs[at : at + size] for at in range(0, len(pairs), size)]

    def _index(self, moves: Sequence[tuple[int, int]]) -> Tensor:
        """[n, 2]: from which block to which, on the device."""
        return torch.tensor(moves, dtype=self._index_dtype).to(self._space.stage.device, non_blocking=True)
