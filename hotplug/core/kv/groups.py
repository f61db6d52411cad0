"""KV groups: the layers of a model that keep K/V of the same positions, and how one pool of equal pages serves them.

Memory is a number of *lanes*; a lane has one tensor for each tensor of a layer's blocks, all with the same number of
pages. A page id stands for that page in every lane, so it holds one block of as many layers as there are lanes. A group
with more layers takes several pages a block, each with a block table of its own: layer `i` of a group reads the table
`i // lanes` in the lane `i % lanes`. All pages are alike, so whatever a group gives up another may take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from hotplug.core.errors import ConfigError
from hotplug.core.kv.spec import BlockFormat, BlockTensor, IntArray, KVSpec

MOST_WASTED = 8
"""Pages of a group may be empty to one part in so many, so that there are fewer tables."""
ALIGNED = 16
"""Bytes that the tensors of a block begin at a multiple of, where pages are bytes."""


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers with equal specs."""

    spec: KVSpec
    layers: tuple[int, ...]
    tables: range
    """The block tables of the group, among those of all groups: one for each page of a block."""
    block_size: int

    def entries(self, num_tokens: IntArray) -> IntArray:
        """Table entries that so many tokens fill."""
        return self.spec.entries(num_tokens, self.block_size)

    def first_needed(self, positions: IntArray) -> IntArray:
        """The first entry that a query at each of `positions` still reads; all before it can be given up."""
        return self.spec.first_needed(positions, self.block_size)

    def entries_of(self, num_tokens: int) -> int:
        """`entries` of one number of tokens."""
        return int(self.entries(np.array([num_tokens], np.int32))[0])

    def first_needed_after(self, num_blocks: int) -> list[int]:
        """By n up to `num_blocks`: the first entry that the query after n full blocks reads."""
        needed: list[int] = self.first_needed(np.arange(num_blocks + 1, dtype=np.int32) * self.block_size).tolist()
        return needed

    def peak_pages(self, num_tokens: int, chunk: int) -> int:
        """The most pages held at once by a sequence that grows to `num_tokens` by at most `chunk` a step."""
        return len(self.tables) * self.spec.peak_entries(num_tokens, chunk, self.block_size)


@dataclass(frozen=True)
class KVGroups:
    """All groups of a model, over lanes of equal pages."""

    groups: tuple[KVGroup, ...]
    lanes: int
    form: BlockFormat

    @property
    def block_size(self) -> int:
        return self.form.block_size

    @property
    def num_tables(self) -> int:
        return self.groups[-1].tables.stop

    @cached_property
    def table_of(self) -> dict[int, int]:
        """By layer: the block table that it reads."""
        return {layer: group.tables[i // self.lanes] for group in self.groups for i, layer in enumerate(group.layers)}

    @cached_property
    def lane_of(self) -> dict[int, int]:
        """By layer: the lane that its blocks are in."""
        return {layer: i % self.lanes for group in self.groups for i, layer in enumerate(group.layers)}

    @cached_property
    def spec_of(self) -> dict[int, KVSpec]:
        """By layer."""
        return {layer: group.spec for group in self.groups for layer in group.layers}

    @cached_property
    def page(self) -> tuple[int, BlockTensor]:
        """How many tensors a lane has, and one page of each: those of a layer's block, where all layers' are alike.

        Where they differ, one tensor of bytes, enough for the largest block; each layer has views of it (`views`).
        """
        blocks = [group.spec.tensors(self.form) for group in self.groups]
        if len({tensor for tensors in blocks for tensor in tensors}) == 1 == len({len(tensors) for tensors in blocks}):
            return len(blocks[0]), blocks[0][0]
        return 1, BlockTensor((max(_offsets(tensors)[-1] for tensors in blocks),), "uint8")

    @property
    def views(self) -> bool:
        """Whether layers' blocks are views of a lane's bytes, one block apart from the next by a page."""
        return self.page[1].dtype == "uint8"

    def offsets(self, layer: int) -> list[int]:
        """Where in a page of bytes each tensor of a layer's block begins, and where the last one ends."""
        return _offsets(self.spec_of[layer].tensors(self.form))

    @property
    def page_bytes(self) -> int:
        """Bytes of a page in all lanes together."""
        count, tensor = self.page
        return self.lanes * count * tensor.bytes

    def peak_pages(self, num_tokens: int, chunk: int) -> int:
        """The most pages held at once by a sequence that grows to `num_tokens` by at most `chunk` a step."""
        return sum(group.peak_pages(num_tokens, chunk) for group in self.groups)

    def longest(self, pages: int, most: int, chunk: int) -> int:
        """The longest sequence, up to `most` tokens, that `pages` pages hold while it grows by `chunk` at most."""
        if self.peak_pages(most, chunk) <= pages:
            return most
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.peak_pages(middle, chunk) <= pages else (low, middle)
        return low

    @cached_property
    def cacheable(self) -> bool:
        """Whether sequences may share the blocks of a prefix: those of all groups, or none."""
        return all(group.spec.cacheable for group in self.groups)

    @cached_property
    def free_blocks_early(self) -> bool:
        """Whether any group gives up blocks while a sequence grows."""
        return any(group.spec.frees for group in self.groups)


def make_groups(specs: Sequence[KVSpec], form: BlockFormat) -> KVGroups:
    """The groups of a model with these specs, by layer. Raises ConfigError without any layer."""
    if not specs:
        raise ConfigError("a model has one layer with a KV spec at least", where="kv_specs")
    if form.block_size < 1:
        raise ConfigError(f"block_size must be at least 1, got {form.block_size}", where="KV groups")
    layers: dict[KVSpec, list[int]] = {}
    for layer, spec in enumerate(specs):
        layers.setdefault(spec, []).append(layer)
    lanes = _lanes([len(own) for own in layers.values()])
    groups, first = [], 0
    for spec, own in layers.items():
        tables = range(first, first - len(own) // -lanes)
        groups.append(KVGroup(spec, tuple(own), tables, form.block_size))
        first = tables.stop
    return KVGroups(tuple(groups), lanes, form)


def _offsets(tensors: Sequence[BlockTensor]) -> list[int]:
    return [0, *accumulate(-(-tensor.bytes // ALIGNED) * ALIGNED for tensor in tensors)]


def _lanes(counts: Sequence[int]) -> int:
    """Lanes for groups of so many layers: the most that leave no group's pages emptier than allowed."""
    return next(
        lanes for lanes in range(max(counts), 0, -1) if all((-count % lanes) * MOST_WASTED <= count for count in counts)
    )
