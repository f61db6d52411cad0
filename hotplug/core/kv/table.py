"""The block tables of one KV group: which pages hold what of each row, taken from the pool and given back to it.

Hot path: `missing` and `extend` are vectorized over rows; only rows that get a block cost more.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hotplug.core.kv.groups import KVGroup
from hotplug.core.kv.pool import NULL_BLOCK, BlockPool
from hotplug.core.kv.spec import IntArray

Changes = list[tuple[int, IntArray, IntArray, IntArray]]
"""(table, rows, columns, page ids): cells of block tables that changed."""


class GroupTables:
    """A group's tables: [tables, rows, entries] page ids; null behind a window and past a row's last entry."""

    def __init__(self, group: KVGroup, pool: BlockPool, changes: Changes, *, max_rows: int, max_len: int) -> None:
        """`changes` is told of every cell that changes."""
        self.group = group
        self._pool = pool
        self._changes = changes
        self._entries, self._block_size = group.spec.entries, group.block_size
        columns = group.entries_of(max_len)
        self.pages: IntArray = np.zeros((len(group.tables), max_rows, columns), np.int32)
        self.num_entries: IntArray = np.zeros(max_rows, np.int32)
        """[max_rows] entries in use, those behind the window included."""
        self.first: IntArray = np.zeros(max_rows, np.int32)
        """[max_rows] the first entry that is held; those before are behind the window."""

    def missing(self, rows: IntArray, lengths: IntArray) -> int:
        """Pages that `rows` take from the pool to hold `lengths` tokens."""
        need = np.maximum(self._entries(lengths, self._block_size) - self.num_entries[rows], 0)
        return int(need.sum()) * len(self.pages)

    def extend(self, rows: IntArray, lengths: IntArray) -> None:
        """Give each of `rows` pages for `lengths` tokens."""
        have, want = self.num_entries[rows], self._entries(lengths, self._block_size)
        grow = np.flatnonzero(want > have)
        if not grow.size:
            return
        rows, have, want = rows[grow], have[grow], want[grow]
        counts = want - have
        total = int(counts.sum())
        ids = np.array(self._pool.allocate(total * len(self.pages)), np.int32).reshape(len(self.pages), total)
        self.num_entries[rows] = want
        # Columns have[i], have[i] + 1, .. want[i] - 1 of each row, rows one after the other.
        before = np.cumsum(counts, dtype=np.int32) - counts
        columns = np.arange(total, dtype=np.int32) + np.repeat(have - before, counts)
        self._set(np.repeat(rows, counts), columns, ids)

    def outstanding(self, row: int, num_tokens: int, chunk: int) -> int:
        """Pages that a row still takes until `num_tokens` are computed."""
        held = int(self.num_entries[row] - self.first[row]) * len(self.pages)
        return max(0, self.group.peak_pages(num_tokens, chunk) - held)

    def trim(self, rows: IntArray, positions: IntArray) -> None:
        """Release the blocks that no query from `positions` on needs any more; their entries become null."""
        first = np.minimum(self.group.first_needed(positions), self.num_entries[rows])
        for i in np.flatnonzero(first > self.first[rows]).tolist():
            row, low, high = int(rows[i]), int(self.first[rows[i]]), int(first[i])
            self._release(row, low, high)
            self.first[row] = high
            columns = np.arange(low, high, dtype=np.int32)
            self._set(np.full_like(columns, row), columns, np.zeros((len(self.pages), high - low), np.int32))

    def held(self, row: int, first: int, end: int) -> list[list[int]]:
        """By table: the pages of entries [first, end) of a row."""
        pages: list[list[int]] = self.pages[:, row, first:end].tolist()
        return pages

    def start(self, row: int, first: int, pages: npt.NDArray[np.int32]) -> None:
        """Fill the tables of an empty row from entry `first` on: [tables, n] `pages`, which the row holds already."""
        n = pages.shape[1]
        self.first[row], self.num_entries[row] = first, first + n
        if n:
            self._set(np.full(n, row, np.int32), np.arange(first, first + n, dtype=np.int32), pages)

    def free(self, row: int) -> None:
        """Release all pages of a row."""
        first, end = int(self.first[row]), int(self.num_entries[row])
        self._release(row, first, end)
        self.pages[:, row, :end] = NULL_BLOCK
        self.first[row] = self.num_entries[row] = 0

    def check(self) -> None:
        """Raise AssertionError where a table entry in use is null, or one beyond is not. For tests."""
        columns = np.arange(self.pages.shape[2])
        held = (columns >= self.first[:, None]) & (columns < self.num_entries[:, None])
        assert (held == (self.pages != NULL_BLOCK)).all(), "a table entry in use is null, or one beyond is not"

    def _release(self, row: int, first: int, end: int) -> None:
        for pages in self.held(row, first, end):
            self._pool.release(pages)

    def _set(self, rows: IntArray, columns: IntArray, ids: npt.NDArray[np.int32]) -> None:
        """Set cells of every table: [tables, n] `ids`."""
        self.pages[:, rows, columns] = ids
        for table, own in zip(self.group.tables, ids, strict=True):
            self._changes.append((table, rows, columns, own))


def as_pages(pages: Sequence[Sequence[int]], tables: int) -> IntArray:
    """[tables, n] int32, also where n is 0."""
    return np.array(pages, np.int32).reshape(tables, -1)
