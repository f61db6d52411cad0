"""The scheduler's side of the persistent batch: per-row state in arrays, so that a step needs no loop.

A row is assigned at admission and removed at finish, abort or preemption. The runner keeps its own copy of
what it needs on the device; nothing here is shared with it.
"""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

from hotplug.core.request import NO_TOKEN
from hotplug.core.scheduler.plan import BoolArray, IntArray
from hotplug.core.scheduler.sequence import Sequence

STOP_TOKENS = 8
"""Stop tokens of a row that are compared in one vectorized pass; rows with more are looked at one by one."""


class RunningBatch:
    """State of `max_num_seqs` rows. All arrays are [max_num_seqs] unless said otherwise."""

    def __init__(self, max_num_seqs: int, max_model_len: int) -> None:
        n = max_num_seqs
        self.sequences: list[Sequence | None] = [None] * n
        self.ids: npt.NDArray[np.object_] = np.full(n, "", np.object_)
        """Request ids, in an array so that those of many rows are taken at once."""
        self.tags: npt.NDArray[np.int64] = np.zeros(n, np.int64)
        self.history: IntArray = np.empty((n, max_model_len), np.int32)
        """[max_num_seqs, max_model_len] tokens whose values the host knows; valid up to `known`. Lazily paged."""
        self.known: IntArray = np.zeros(n, np.int32)
        self.computed: IntArray = np.zeros(n, np.int32)
        """Tokens whose KV is computed by a step that is planned, in flight or done; proposals not counted."""
        self.prefill: IntArray = np.zeros(n, np.int32)
        """Tokens that came with the admission; from there on the row decodes."""
        self.limit: IntArray = np.zeros(n, np.int32)
        """Tokens at which the row ends for its length; 0 for an empty row."""
        self.generation: npt.NDArray[np.int64] = np.zeros(n, np.int64)
        """How often the row was removed: tells a late token of a former owner from one of the present."""
        self.verifying: BoolArray = np.zeros(n, np.bool_)
        """Whether a verification of the row is in flight, so that nobody knows where it goes on."""
        self.first: BoolArray = np.zeros(n, np.bool_)
        """Whether the row's next token makes the request's first delta."""
        self.stops: IntArray = np.full((n, STOP_TOKENS + 1), NO_TOKEN, np.int32)
        """[max_num_seqs, STOP_TOKENS + 1] the last one always `NO_TOKEN`, which ends every row."""
        self.many_stops: BoolArray = np.zeros(n, np.bool_)
        self._free_rows = list(range(n))

    @property
    def num_free(self) -> int:
        return len(self._free_rows)

    @property
    def num_running(self) -> int:
        return len(self.sequences) - len(self._free_rows)

    def owner(self, row: int) -> Sequence:
        """The sequence of a row in use. Raises LookupError for an empty one."""
        seq = self.sequences[row]
        if seq is None:
            raise LookupError(f"row {row} is empty")
        return seq

    def running(self) -> list[Sequence]:
        return [seq for seq in self.sequences if seq is not None]

    def rows(self) -> IntArray:
        """[num_running] rows in use, ascending."""
        return np.flatnonzero(self.limit).astype(np.int32)

    def decoding(self) -> IntArray:
        """[n] rows whose next input is their last sampled token.

        Without those that only wait for their last one, or for the result of a verification.
        """
        computed = self.computed
        ready = (computed >= self.prefill) & (computed + 1 < self.limit) & ~self.verifying
        return np.flatnonzero(ready).astype(np.int32)

    def assign_row(self, seq: Sequence) -> int:
        """Give a sequence the smallest free row."""
        row = heapq.heappop(self._free_rows)
        n = len(seq.token_ids)
        self.sequences[row], self.ids[row], seq.row = seq, seq.request.id, row
        self.tags[row] = seq.request.tag
        self.history[row, :n] = seq.token_ids
        self.known[row] = self.prefill[row] = n
        self.computed[row] = 0
        self.limit[row] = seq.limit
        self.first[row] = not seq.started
        self.many_stops[row] = len(seq.stop_tokens) > STOP_TOKENS
        if not self.many_stops[row]:
            self.stops[row, : len(seq.stop_tokens)] = list(seq.stop_tokens)
        return row

    def remove(self, seq: Sequence) -> None:
        """Take a sequence's row away; `seq.token_ids` becomes its known history."""
        row = seq.row
        seq.token_ids = self.history[row, : self.known[row]].copy()
        self.sequences[row], self.ids[row], seq.row = None, "", -1
        self.limit[row] = 0
        self.verifying[row] = False
        self.stops[row] = NO_TOKEN
        self.many_stops[row] = False
        self.generation[row] += 1
        heapq.heappush(self._free_rows, row)

    def append(self, rows: IntArray, tokens: IntArray) -> tuple[BoolArray, BoolArray]:
        """Store one token a row. Returns per row whether it ends there (by a stop token or for want of a token), and
        whether it is at its limit."""
        position = self.known[rows]
        self.history[rows, position] = tokens
        position += 1
        self.known[rows] = position
        stopped = (self.stops[rows] == tokens[:, None]).any(axis=1)
        many = self.many_stops[rows]
        if many.any():
            for i in np.flatnonzero(many).tolist():
                stopped[i] |= int(tokens[i]) in self.owner(int(rows[i])).stop_tokens
        return stopped, position >= self.limit[rows]

    def confirm(self, row: int, tokens: list[int]) -> None:
        """Store what a verification gave: the row's KV now reaches to all of `tokens` but the last."""
        end = int(self.known[row]) + len(tokens)
        self.history[row, end - len(tokens) : end] = tokens
        self.known[row], self.computed[row] = end, end - 1
        self.verifying[row] = False
