"""The one owner of KV memory on the host: block tables by row, the block pools, and the prefix cache.

The scheduler asks it what fits and tells it which rows grow; the runner gets the changes of the tables as
arrays and keeps its own copy on the device. It knows blocks and rows, not requests.

Hot path: `missing` and `extend` are vectorized over rows; only rows that get a block cost more.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hotplug.core.kv.groups import IntArray, KVGroup
from hotplug.core.kv.host import HostPool, Swapped
from hotplug.core.kv.pool import NULL_BLOCK, BlockPool


class KVManager:
    """Block tables of up to `max_num_seqs` rows over a pool of `num_blocks` blocks (block 0 is the null block).

    With `num_host_blocks` (its null block included) there is a second pool, in host memory, for swapping.
    """

    def __init__(
        self,
        group: KVGroup,
        *,
        num_blocks: int,
        max_num_seqs: int,
        max_model_len: int,
        enable_prefix_cache: bool = True,
        num_host_blocks: int = 0,
    ) -> None:
        self.group = group
        self.block_size = group.block_size
        self.pool = BlockPool(num_blocks)
        self.host = HostPool(num_host_blocks) if num_host_blocks else None
        self.enable_prefix_cache = enable_prefix_cache
        self.tables: IntArray = np.zeros((max_num_seqs, group.num_blocks(max_model_len)), np.int32)
        """[max_num_seqs, max_blocks_per_seq] block ids; 0 beyond `num_blocks` and behind the window."""
        self.num_blocks: IntArray = np.zeros(max_num_seqs, np.int32)
        """[max_num_seqs] table entries in use, those behind the window included."""
        self._first: IntArray = np.zeros(max_num_seqs, np.int32)  # entries before it are behind the window
        self._registered: IntArray = np.zeros(max_num_seqs, np.int32)  # leading blocks offered to the cache
        self._changes: list[tuple[IntArray, IntArray, IntArray]] = []

    # --- asking ---

    def max_tokens_alone(self, chunk: int) -> int:
        """Longest KV, in tokens, of a sequence that has the pool to itself and grows by `chunk` at most."""
        most = self.tables.shape[1] * self.block_size
        fits = self.group.peak_blocks(most, chunk) <= self.pool.num_usable
        return most if fits else min(most, self.pool.num_usable * self.block_size)

    def match(self, digests: Sequence[bytes]) -> list[int]:
        """The longest usable cached prefix of a sequence with these block hashes, as block-table entries.

        With a sliding window only the blocks that the next query needs must be there; those before are 0.
        Nothing is reserved: `admit` takes the references.
        """
        found: list[int] = []
        usable, last_miss = 0, -1
        for i, digest in enumerate(digests):
            block = self.pool.lookup(digest)
            if block is None:
                if self.group.window is None:
                    break
                last_miss = i
            found.append(NULL_BLOCK if block is None else block)
            if last_miss < self.group.first_needed_block((i + 1) * self.block_size):
                usable = i + 1
        first = self.group.first_needed_block(usable * self.block_size)
        return [NULL_BLOCK] * first + found[first:usable]

    def cost(self, matched: Sequence[int], num_tokens: int, chunk: int) -> int:
        """Free blocks that a sequence takes by the time `num_tokens` are computed, its `matched` prefix known."""
        held = [block for block in matched if block != NULL_BLOCK]
        free = sum(self.pool.references(block) == 0 for block in held)
        return max(0, self.group.peak_blocks(num_tokens, chunk) - len(held)) + free

    def outstanding(self, row: int, num_tokens: int, chunk: int) -> int:
        """Free blocks that a row still takes until `num_tokens` are computed."""
        held = int(self.num_blocks[row] - self._first[row])
        return max(0, self.group.peak_blocks(num_tokens, chunk) - held)

    def missing(self, rows: IntArray, lengths: IntArray) -> int:
        """How many blocks the pool lacks for `rows` ([n] int32) to hold `lengths` ([n] int32) tokens; 0 if none."""
        need = np.maximum(self._entries(lengths) - self.num_blocks[rows], 0)
        return max(0, int(need.sum()) - self.pool.num_free)

    # --- changing ---

    def admit(self, row: int, matched: Sequence[int]) -> None:
        """Start an empty row on a cached prefix (`match`)."""
        first = sum(block == NULL_BLOCK for block in matched)
        self.pool.share(matched[first:])
        self._start(row, first, matched)
        self._registered[row] = len(matched)

    def extend(self, rows: IntArray, lengths: IntArray) -> None:
        """Give each of `rows` blocks for `lengths` tokens. Raises OutOfMemoryError: ask `missing` before."""
        have, want = self.num_blocks[rows], self._entries(lengths)
        grow = np.flatnonzero(want > have)
        if not grow.size:
            return
        rows, have, want = rows[grow], have[grow], want[grow]
        counts = want - have
        total = int(counts.sum())
        ids = np.array(self.pool.allocate(total), np.int32)
        self.num_blocks[rows] = want
        # Columns have[i], have[i] + 1, .. want[i] - 1 of each row, rows one after the other.
        before = np.cumsum(counts, dtype=np.int32) - counts
        columns = np.arange(total, dtype=np.int32) + np.repeat(have - before, counts)
        self._set(np.repeat(rows, counts), columns, ids)

    def trim(self, rows: IntArray, positions: IntArray) -> None:
        """Release the blocks that no query from `positions` on needs any more; their table entries become 0."""
        if self.group.window is None:
            return
        first = np.minimum(self.group.first_needed_blocks(positions), self.num_blocks[rows])
        for i in np.flatnonzero(first > self._first[rows]).tolist():
            row, low, high = int(rows[i]), int(self._first[rows[i]]), int(first[i])
            self.pool.release(self.tables[row, low:high].tolist())
            self._first[row] = high
            columns = np.arange(low, high, dtype=np.int32)
            self._set(np.full_like(columns, row), columns, np.zeros_like(columns))

    def unregistered(self, rows: IntArray, lengths: IntArray) -> IntArray:
        """Indices into `rows` whose first `lengths` tokens fill a block that `register` has not seen."""
        if not self.enable_prefix_cache:
            return np.empty(0, np.int32)
        full = lengths // np.int32(self.block_size)
        return np.flatnonzero(full > self._registered[rows]).astype(np.int32)

    def register(self, row: int, digests: Sequence[bytes], num_blocks: int) -> list[tuple[int, bytes]]:
        """Put the first `num_blocks` blocks of a row, full and with known hashes, into the prefix cache.

        Their K/V must be computed by a step already planned or being planned. Returns those that were not
        registered before, each with its hash.
        """
        new = []
        first = int(self._registered[row])
        for column in range(first, num_blocks):
            block = int(self.tables[row, column])
            if block != NULL_BLOCK:
                self.pool.cache(block, digests[column])
                new.append((block, digests[column]))
        self._registered[row] = max(first, num_blocks)
        return new

    def forget(self, digests: Sequence[bytes]) -> None:
        """Take the blocks of these hashes out of the prefix cache, here and on the host."""
        self.pool.forget(digests)
        if self.host is not None:
            self.host.blocks.forget(digests)

    def free(self, row: int) -> None:
        """Release all blocks of a row. Cached ones stay findable until they are allocated anew."""
        first, end = int(self._first[row]), int(self.num_blocks[row])
        self.pool.release(self.tables[row, first:end].tolist())
        self.tables[row, :end] = NULL_BLOCK
        self._first[row] = self.num_blocks[row] = self._registered[row] = 0
        # A row may be given away again before the changes are taken: they must not name a cell twice.
        kept = [(rows != row, (rows, cols, ids)) for rows, cols, ids in self._changes]
        self._changes = [(r[keep], c[keep], i[keep]) for keep, (r, c, i) in kept]

    # --- swapping ---

    def swap_out(self, row: int, num_tokens: int, digests: Sequence[bytes]) -> Swapped | None:
        """Keep a row's KV of its first `num_tokens` tokens on the host; None where that has no room.

        `digests` are the hashes of its leading full blocks, as far as known. The row's blocks may be freed at once:
        they are copied (`take_swap_out`) before the next plan writes anything.
        """
        if self.host is None:
            return None
        first, end = int(self._first[row]), self.group.num_blocks(num_tokens)
        names: list[bytes | None] = [*digests[first:end]]
        names += [None] * (end - first - len(names))
        blocks = self.host.store(self.tables[row, first:end].tolist(), names)
        return None if blocks is None else Swapped(num_tokens, first, blocks)

    def swap_in(self, row: int, swapped: Swapped, shared: Sequence[int]) -> list[tuple[int, int]]:
        """Start an empty row on KV from the host. Raises OutOfMemoryError: ask `cost` before.

        `shared` are the leading ones of its blocks that the prefix cache still has. Returns (device block, host
        block) of the others, which the plan being made copies. The host blocks stay held: see `drop`.
        """
        sources = swapped.blocks[len(shared) :]
        self.pool.share(shared)  # before allocating, which could evict them
        fresh = self.pool.allocate(len(sources))
        self._start(row, swapped.first, [NULL_BLOCK] * swapped.first + [*shared, *fresh])
        self._registered[row] = swapped.first + len(shared)
        return list(zip(fresh, sources, strict=True))

    def drop(self, swapped: Swapped) -> None:
        """Free the host blocks of a sequence that has come back, or has ended."""
        assert self.host is not None
        self.host.release(swapped.blocks)

    def take_swap_out(self) -> list[tuple[int, int]]:
        """(device block, host block) of what was swapped out since the last call, for the plan being made."""
        return [] if self.host is None else self.host.take_copies()

    # --- for the runner, for tests ---

    def take_changes(self) -> tuple[IntArray, IntArray, IntArray]:
        """(rows, columns, ids), [n] int32 each: the table cells that changed since the last call, each once."""
        changes, self._changes = self._changes, []
        if len(changes) == 1:
            return changes[0]
        if not changes:
            empty = np.empty(0, np.int32)
            return empty, empty, empty
        rows, columns, ids = (np.concatenate(parts) for parts in zip(*changes, strict=True))
        return rows, columns, ids

    def check(self) -> None:
        """Raise AssertionError unless pool and tables agree. For tests."""
        self.pool.check()
        if self.host is not None:
            self.host.blocks.check()
        counts = np.bincount(self.tables.ravel(), minlength=self.pool.num_blocks)
        for block in range(1, self.pool.num_blocks):
            assert counts[block] == self.pool.references(block), f"block {block}: references and tables differ"
        columns = np.arange(self.tables.shape[1])
        held = (columns >= self._first[:, None]) & (columns < self.num_blocks[:, None])
        assert np.array_equal(self.tables != NULL_BLOCK, held), "a table entry in use is null, or one beyond is not"

    def _entries(self, lengths: IntArray) -> IntArray:
        return (lengths + np.int32(self.block_size - 1)) // np.int32(self.block_size)

    def _start(self, row: int, first: int, entries: Sequence[int]) -> None:
        """Fill the table of an empty row; the entries before `first` are null."""
        n = len(entries)
        self._first[row], self.num_blocks[row] = first, n
        if n:
            self._set(np.full(n, row, np.int32), np.arange(n, dtype=np.int32), np.array(entries, np.int32))

    def _set(self, rows: IntArray, columns: IntArray, ids: IntArray) -> None:
        self.tables[rows, columns] = ids
        self._changes.append((rows, columns, ids))
