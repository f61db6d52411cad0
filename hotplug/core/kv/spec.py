"""What a layer keeps of a sequence, and for how long: the data that KV groups, tables and memory follow from.

A model gives one `KVSpec` a layer. Layers with equal specs form a group (`hotplug.core.kv.groups`). A new kind is a
subclass: it says what one block of a layer looks like and which blocks a query still reads; tables, pool, prefix cache,
swap and memory need no change.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from hotplug.core.errors import ConfigError

IntArray = npt.NDArray[np.int32]
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8_e4m3": 1, "int8": 1, "uint8": 1}
"""Bytes of an element, by the names of dtypes."""


@dataclass(frozen=True, slots=True)
class BlockTensor:
    """One block of one tensor that a layer keeps."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """What all attention blocks of an engine have in common."""

    block_size: int
    """Tokens in a block."""
    layout: str
    """Order of a block's axes: NHD or HND."""
    dtype: str


@dataclass(frozen=True, kw_only=True)
class KVSpec(ABC):
    """What one layer keeps. Subclasses are frozen dataclasses: equal fields make layers of one group."""

    kind: ClassVar[str]
    """The name that platforms declare (`Limits.kv_kinds`) and that `explain` prints."""
    cacheable: ClassVar[bool] = True
    """Whether the blocks of a prefix are of use to other sequences with that prefix."""

    @abstractmethod
    def tensors(self, form: BlockFormat) -> tuple[BlockTensor, ...]:
        """One block of each tensor of a layer."""

    def entries(self, num_tokens: IntArray, block_size: int) -> IntArray:
        """Block-table entries that so many tokens fill; int32, of the same shape."""
        return (num_tokens + np.int32(block_size - 1)) // np.int32(block_size)

    def first_needed(self, positions: IntArray, block_size: int) -> IntArray:
        """The first entry that a query at each of `positions` still reads; int32, of the same shape."""
        return np.zeros_like(positions)

    @property
    def frees(self) -> bool:
        """Whether a sequence gives up blocks while it grows."""
        return False

    def peak_entries(self, num_tokens: int, chunk: int, block_size: int) -> int:
        """The most entries held at once by a sequence that grows to `num_tokens` by at most `chunk` a step."""
        return int(self.entries(np.array([num_tokens], np.int32), block_size)[0])


@dataclass(frozen=True, kw_only=True)
class FullAttention(KVSpec):
    """Keys and values of every token."""

    kind: ClassVar[str] = "full"
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        _at_least_one(self, "num_kv_heads", "head_dim")

    @property
    def reach(self) -> int | None:
        """Tokens that a query sees, itself included; None for all before it."""
        return None

    def tensors(self, form: BlockFormat) -> tuple[BlockTensor, ...]:
        """Keys and values: [block_size, num_kv_heads, head_dim], or [num_kv_heads, block_size, head_dim] in HND."""
        sizes = (form.block_size, self.num_kv_heads, self.head_dim)
        if form.layout == "HND":
            sizes = (self.num_kv_heads, form.block_size, self.head_dim)
        return (BlockTensor(sizes, form.dtype),) * 2


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(FullAttention):
    """Keys and values of the last tokens; blocks behind the window are given up."""

    kind: ClassVar[str] = "window"
    window: int
    """Tokens that a query sees, itself included."""

    def __post_init__(self) -> None:
        _at_least_one(self, "num_kv_heads", "head_dim", "window")

    @property
    def reach(self) -> int | None:
        return self.window

    def first_needed(self, positions: IntArray, block_size: int) -> IntArray:
        return np.maximum(positions - np.int32(self.window - 1), np.int32(0)) // np.int32(block_size)

    @property
    def frees(self) -> bool:
        return True

    def peak_entries(self, num_tokens: int, chunk: int, block_size: int) -> int:
        # A step's queries reach window - 1 tokens back from its first; a span may straddle one block more.
        return min(-(-num_tokens // block_size), -(-(self.window + chunk - 2) // block_size) + 1)


@dataclass(frozen=True, kw_only=True)
class LatentAttention(KVSpec):
    """One latent vector a token, which keys and values are made of (MLA; DeepSeek-V2, 2024)."""

    kind: ClassVar[str] = "latent"
    width: int
    """Elements a token: the compressed vector and the rotated part that all heads share."""

    def __post_init__(self) -> None:
        _at_least_one(self, "width")

    def tensors(self, form: BlockFormat) -> tuple[BlockTensor, ...]:
        """One tensor, [block_size, width]."""
        return (BlockTensor((form.block_size, self.width), form.dtype),)


@dataclass(frozen=True, kw_only=True)
class RecurrentState(KVSpec):
    """A state of fixed size, whatever the sequence's length: one block a sequence, in the first entry of its table.

    The layer starts it anew where a sequence's first token is at position 0. It holds all tokens of a sequence, so no
    other sequence can begin with it.
    """

    kind: ClassVar[str] = "state"
    cacheable: ClassVar[bool] = False
    states: tuple[BlockTensor, ...]

    def tensors(self, form: BlockFormat) -> tuple[BlockTensor, ...]:
        return self.states

    def entries(self, num_tokens: IntArray, block_size: int) -> IntArray:
        return np.minimum(num_tokens, np.int32(1))


def _at_least_one(spec: KVSpec, *names: str) -> None:
    for name in names:
        if getattr(spec, name) < 1:
            raise ConfigError(f"{name} must be at least 1, got {getattr(spec, name)}", where=type(spec).__name__)
