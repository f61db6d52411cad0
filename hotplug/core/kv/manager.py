"""The one owner of KV memory on the host: the block tables of all groups, the pools, and the prefix cache.

The scheduler asks it what fits and tells it which rows grow; the runner gets the changes of the tables as
arrays and keeps its own copy on the device. It knows pages and rows, not requests. A sequence has a block of
every group for each `block_size` tokens; `num_blocks` counts those, whatever pages they take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hotplug.core.kv.groups import KVGroup, KVGroups
from hotplug.core.kv.host import HostPool, Swapped
from hotplug.core.kv.pool import NULL_BLOCK, BlockPool
from hotplug.core.kv.spec import IntArray
from hotplug.core.kv.table import Changes, GroupTables, as_pages

TableChanges = tuple[IntArray, IntArray, IntArray, IntArray]
"""[n] int32 each: tables, rows, columns, page ids."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """Cached blocks that a sequence can begin with. Nothing is reserved: `admit` takes the references."""

    num_blocks: int
    """Blocks of the sequence that need not be computed."""
    pages: tuple[list[list[int]], ...]
    """By group and table: the pages of the last of these blocks, as many as the group still needs."""


class KVManager:
    """Block tables of up to `max_num_seqs` rows over a pool of `num_pages` pages (page 0 is the null page).

    With `num_host_pages` (its null page included) there is a second pool, in host memory, for swapping.
    """

    def __init__(
        self,
        groups: KVGroups,
        *,
        num_pages: int,
        max_num_seqs: int,
        max_model_len: int,
        enable_prefix_cache: bool = True,
        num_host_pages: int = 0,
    ) -> None:
        self.groups = groups
        self.block_size = groups.block_size
        self.pool = BlockPool(num_pages)
        self.host = HostPool(num_host_pages) if num_host_pages else None
        self.enable_prefix_cache = enable_prefix_cache and groups.cacheable
        self._max_model_len = max_model_len
        self._changes: Changes = []
        self.tables = tuple(
            GroupTables(group, self.pool, self._changes, max_rows=max_num_seqs, max_len=max_model_len)
            for group in groups.groups
        )
        self._registered: IntArray = np.zeros(max_num_seqs, np.int32)  # leading blocks offered to the cache

    # --- asking ---

    def max_tokens_alone(self, chunk: int) -> int:
        """Longest KV, in tokens, of a sequence that has the pool to itself and grows by `chunk` at most."""
        most = -(-self._max_model_len // self.block_size) * self.block_size
        return self.groups.longest(self.pool.num_usable, most, chunk)

    def match(self, digests: Sequence[bytes]) -> Prefix:
        """The longest usable cached prefix of a sequence with these block hashes.

        Every group must have the blocks that the next query reads: all of them, or the last ones where it has a window.
        """
        groups = self.groups.groups
        found = [self._cached(group, digests) for group in groups]
        usable = min(len(blocks) for blocks, _ in found)
        while not all(ends[usable] for _, ends in found):  # no blocks at all are always usable
            usable -= 1
        kept = (
            blocks[group.first_needed_after(usable)[-1] : usable]
            for group, (blocks, _) in zip(groups, found, strict=True)
        )
        return Prefix(usable, tuple(
            [list(own) for own in zip(*blocks, strict=True)] or [[] for _ in group.tables]
            for group, blocks in zip(groups, kept, strict=True)
        ))  # fmt: skip

    def cost(self, prefix: Prefix, num_tokens: int, chunk: int) -> int:
        """Free pages that a sequence takes by the time `num_tokens` are computed, its `prefix` known."""
        total = 0
        for tables, pages in zip(self.tables, prefix.pages, strict=True):
            held = [page for own in pages for page in own]
            free = sum(self.pool.references(page) == 0 for page in held)
            total += max(0, tables.group.peak_pages(num_tokens, chunk) - len(held)) + free
        return total

    def outstanding(self, row: int, num_tokens: int, chunk: int) -> int:
        """Free pages that a row still takes until `num_tokens` are computed."""
        return sum(tables.outstanding(row, num_tokens, chunk) for tables in self.tables)

    def missing(self, rows: IntArray, lengths: IntArray) -> int:
        """How many pages the pool lacks for `rows` ([n] int32) to hold `lengths` ([n] int32) tokens; 0 if none."""
        lacking = -self.pool.num_free
        for tables in self.tables:
            lacking += tables.missing(rows, lengths)
        return max(lacking, 0)

    # --- changing ---

    def admit(self, row: int, prefix: Prefix) -> None:
        """Start an empty row on a cached prefix (`match`)."""
        for tables, pages in zip(self.tables, prefix.pages, strict=True):
            for own in pages:
                self.pool.share(own)
            tables.start(row, prefix.num_blocks - len(pages[0]), as_pages(pages, len(tables.group.tables)))
        self._registered[row] = prefix.num_blocks

    def extend(self, rows: IntArray, lengths: IntArray) -> None:
        """Give each of `rows` pages for `lengths` tokens. Raises OutOfMemoryError: ask `missing` before."""
        for tables in self.tables:
            tables.extend(rows, lengths)

    def trim(self, rows: IntArray, positions: IntArray) -> None:
        """Release the blocks that no query from `positions` on needs any more; their table entries become null."""
        for tables in self.tables:
            if tables.group.spec.frees:
                tables.trim(rows, positions)

    def unregistered(self, rows: IntArray, lengths: IntArray) -> IntArray:
        """Indices into `rows` whose first `lengths` tokens fill a block that `register` has not seen."""
        if not self.enable_prefix_cache:
            return np.empty(0, np.int32)
        full = lengths // np.int32(self.block_size)
        return np.flatnonzero(full > self._registered[rows]).astype(np.int32)

    def register(self, row: int, digests: Sequence[bytes], num_blocks: int) -> list[tuple[int, bytes]]:
        """Put the first `num_blocks` blocks of a row, full and with known hashes, into the prefix cache.

        Their K/V must be computed by a step already planned or being planned. Returns the pages of the first table that
        were not registered before, each with its hash.
        """
        new = []
        first = int(self._registered[row])
        for tables in self.tables:
            for table, pages in zip(tables.group.tables, tables.pages, strict=True):
                for column in range(first, num_blocks):
                    page, digest = int(pages[row, column]), digests[column]
                    if page == NULL_BLOCK:
                        continue
                    if table:
                        self.pool.cache(page, _key(digest, table))
                    else:
                        self.pool.cache(page, digest)
                        new.append((page, digest))
        self._registered[row] = max(first, num_blocks)
        return new

    def forget(self, digests: Sequence[bytes]) -> None:
        """Take the blocks of these hashes out of the prefix cache, here and on the host."""
        keys = [_key(digest, table) for table in range(self.groups.num_tables) for digest in digests]
        self.pool.forget(keys)
        if self.host is not None:
            self.host.blocks.forget(keys)

    def free(self, row: int) -> None:
        """Release all blocks of a row. Cached ones stay findable until they are allocated anew."""
        for tables in self.tables:
            tables.free(row)
        self._registered[row] = 0
        # A row may be given away again before the changes are taken: they must not name a cell twice.
        kept = [(table, rows != row, (rows, cols, ids)) for table, rows, cols, ids in self._changes]
        self._changes[:] = [(table, r[keep], c[keep], i[keep]) for table, keep, (r, c, i) in kept]

    # --- swapping ---

    def swap_out(self, row: int, num_tokens: int, digests: Sequence[bytes]) -> Swapped | None:
        """Keep a row's KV of its first `num_tokens` tokens on the host; None where that lacks memory.

        `digests` are the hashes of its leading full blocks, as far as known. The row's blocks may be freed at once:
        they are copied (`take_swap_out`) before the next plan writes anything.
        """
        if self.host is None:
            return None
        pages: list[int] = []
        keys: list[bytes | None] = []
        firsts = []
        for tables in self.tables:
            first, end = int(tables.first[row]), tables.group.entries_of(num_tokens)
            firsts.append(first)
            for table, own in zip(tables.group.tables, tables.held(row, first, end), strict=True):
                pages += own
                known = [_key(digest, table) for digest in digests[first:end]]
                keys += [*known, *[None] * (len(own) - len(known))]
        held = self.host.store(pages, keys)
        return None if held is None else Swapped(num_tokens, tuple(firsts), held)

    def shared(self, prefix: Prefix, swapped: Swapped) -> Prefix:
        """What of a cached prefix a swapped-out sequence can take from the device: its blocks that the host has too."""
        kept = []
        for first, pages in zip(swapped.firsts, prefix.pages, strict=True):
            behind = first - (prefix.num_blocks - len(pages[0]))
            kept.append([own[behind:] if behind >= 0 else [] for own in pages])
        return Prefix(prefix.num_blocks, tuple(kept))

    def swap_in(self, row: int, swapped: Swapped, shared: Prefix) -> list[tuple[int, int]]:
        """Start an empty row on KV from the host. Raises OutOfMemoryError: ask `cost` before.

        `shared` are the leading ones of its blocks that the prefix cache still has. Returns (device page, host page) of
        the others, which the plan being made copies. The host pages stay held: see `drop`.
        """
        for pages in shared.pages:  # before allocating, which could evict them
            for own in pages:
                self.pool.share(own)
        sources = iter(swapped.pages)
        copies: list[tuple[int, int]] = []
        for tables, first, pages in zip(self.tables, swapped.firsts, shared.pages, strict=True):
            count = tables.group.entries_of(swapped.num_tokens) - first
            filled = []
            for own in pages:
                hosts = [next(sources) for _ in range(count)][len(own) :]
                fresh = self.pool.allocate(len(hosts))
                copies += zip(fresh, hosts, strict=True)
                filled.append([*own, *fresh])
            tables.start(row, first, as_pages(filled, len(filled)))
        self._registered[row] = shared.num_blocks
        return copies

    def drop(self, swapped: Swapped) -> None:
        """Free the host pages of a sequence that has come back, or has ended."""
        assert self.host is not None
        self.host.release(swapped.pages)

    def take_swap_out(self) -> list[tuple[int, int]]:
        """(device page, host page) of what was swapped out since the last call, for the plan being made."""
        return [] if self.host is None else self.host.take_copies()

    # --- for the runner, for tests ---

    def take_changes(self) -> TableChanges:
        """The table cells that changed since the last call, each once."""
        changes = self._changes[:]
        del self._changes[:]
        if not changes:
            empty = np.empty(0, np.int32)
            return empty, empty, empty, empty
        if len(changes) == 1:
            table, rows, columns, ids = changes[0]
            return np.full_like(rows, table), rows, columns, ids
        tables = np.repeat(np.array([c[0] for c in changes], np.int32), [len(c[1]) for c in changes])
        rows, columns, ids = (np.concatenate(parts) for parts in zip(*(c[1:] for c in changes), strict=True))
        return tables, rows, columns, ids

    def check(self) -> None:
        """Raise AssertionError unless pool and tables agree. For tests."""
        self.pool.check()
        if self.host is not None:
            self.host.blocks.check()
        counts = sum(np.bincount(tables.pages.ravel(), minlength=self.pool.num_blocks) for tables in self.tables)
        assert isinstance(counts, np.ndarray)
        for page in range(1, self.pool.num_blocks):
            assert counts[page] == self.pool.references(page), f"page {page}: references and tables differ"
        for tables in self.tables:
            tables.check()

    def _cached(self, group: KVGroup, digests: Sequence[bytes]) -> tuple[list[tuple[int, ...]], list[bool]]:
        """A group's cached pages by block, null where one is missing; and by n, whether the first n blocks are usable.

        The lists end where no longer prefix can be usable.
        """
        blocks: list[tuple[int, ...]] = []
        misses = [-1]
        """By n: the last of the first n blocks that is missing."""
        for i, digest in enumerate(digests):
            found = [self.pool.lookup(_key(digest, table)) for table in group.tables]
            pages = tuple(page for page in found if page is not None)
            missing = len(pages) < len(found)
            if missing and not group.spec.frees:
                break
            blocks.append((NULL_BLOCK,) * len(found) if missing else pages)
            misses.append(i if missing else misses[-1])
        needed = group.first_needed_after(len(blocks))
        return blocks, [miss < first for miss, first in zip(misses, needed, strict=True)]


def _key(digest: bytes, table: int) -> bytes:
    """What the page of a block in a table is found by."""
    return digest if not table else digest + table.to_bytes(2, "little")
