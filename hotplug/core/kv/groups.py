"""What a group of layers with the same attention reach asks of the block pool.

A group is full attention or a sliding window. The layers of a group share one block table. All layers of
the models served today fit one group: full, or sliding with the widest window.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hotplug.core.errors import ConfigError

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class KVGroup:
    """Layers that keep K/V of the same positions."""

    block_size: int
    """Tokens in a block."""
    window: int | None = None
    """Tokens a query sees, itself included; None is full attention."""

    def __post_init__(self) -> None:
        for name, value in (("block_size", self.block_size), ("window", self.window)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}", where="KV group")

    def first_needed_block(self, position: int) -> int:
        """The first block that a query at `position` still reads; all before it are behind the window."""
        return 0 if self.window is None else max(0, position - self.window + 1) // self.block_size

    def first_needed_blocks(self, positions: IntArray) -> IntArray:
        """`first_needed_block` of many positions, [n] int32."""
        if self.window is None:
            return np.zeros_like(positions)
        return np.maximum(positions - (self.window - 1), 0) // np.int32(self.block_size)

    def num_blocks(self, num_tokens: int) -> int:
        """Block-table entries that `num_tokens` tokens fill."""
        return -(-num_tokens // self.block_size)

    def peak_blocks(self, num_tokens: int, chunk: int) -> int:
        """The most blocks held at once by a sequence that grows to `num_tokens` by at most `chunk` a step."""
        blocks = self.num_blocks(num_tokens)
        if self.window is None:
            return blocks
        # A step's queries reach window - 1 tokens back from its first; a span may straddle one block more.
        return min(blocks, -(-(self.window + chunk - 2) // self.block_size) + 1)
